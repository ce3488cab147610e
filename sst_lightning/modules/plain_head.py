"""A check that logits are the language-model head applied to the decoder's last state."""

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from transformers import PreTrainedModel

# Gemma 2 and 3, Cohere, Granite, Falcon-H1.
LOGIT_OPTIONS = ("final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier")


@torch.no_grad()
def check_plain_head(model: PreTrainedModel) -> None:
    """Refuse architectures that do something to the logits after the head.

    Logits are computed at labelled positions only, from the decoder's last hidden state. For a
    model that scales or caps them the loss would silently be another one. Known options are looked
    up in the configuration; unknown ones show in the logits of a three-token text.

    Raises:
        MisconfigurationException: the architecture post-processes its logits.
    """
    config = model.config.get_text_config()
    for option in LOGIT_OPTIONS:
        value = getattr(config, option, None)
        if value is not None and value != 1:
            raise MisconfigurationException(
                f"{type(model).__name__} has {option}={value} in its configuration: models that "
                "post-process their logits are not supported; choose another base model"
            )
    ids = torch.arange(3, device=model.device).unsqueeze(0)
    hidden = model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
    ours = model.get_output_embeddings()(hidden).float()
    theirs = model(input_ids=ids, use_cache=False).logits.float()
    if not torch.allclose(ours, theirs, rtol=0.02, atol=0.02 * float(theirs.abs().max())):
        raise MisconfigurationException(
            f"the logits of {type(model).__name__} are not its language-model head applied to the "
            "decoder's last state: this architecture is not supported; choose another base model"
        )
