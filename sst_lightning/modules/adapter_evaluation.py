"""LightningModule behind ``sst-merge test``: any PEFT adapter folder, or the bare base."""

from pathlib import Path

from peft import PeftModel
from transformers import PreTrainedModel

from sst_lightning.algebra.adapter import LoraAdapter
from sst_lightning.algebra.files import refuse_overwrite, remove_outputs, write_text
from sst_lightning.metrics.examples import EXAMPLES, write_examples
from sst_lightning.metrics.scores import ModelScores
from sst_lightning.modules.backbone import Attention, Dtype, Quantization
from sst_lightning.modules.base_check import check_base_name, check_shapes
from sst_lightning.modules.evaluation import EvaluationModule
from sst_lightning.modules.processes import on_rank_zero
from sst_lightning.report.figures import save_figure
from sst_lightning.report.provenance import provenance
from sst_lightning.report.records import write_records
from sst_lightning.report.suite_figures import suites_figure
from sst_lightning.report.suite_summary import SUITES_FIGURE, suite_facts, suite_report
from sst_lightning.report.summary import Candidate, build_records


class AdapterEvaluation(EvaluationModule):
    """Measures a base model, with or without one adapter, as PEFT serves it.

    Args:
        base: alias, hub id or folder of the base model.
        adapter: PEFT folder; the bare base when not given.
        output: folder that gets ``results.json``, ``report.md`` and, of suites, ``examples``; nothing
            is written when not given.
        cache: folder of the suites' outputs, from which an interrupted or repeated evaluation goes
            on; ``<output>/outputs`` when not given.
        overwrite: replace a ``results.json`` that exists.
        dtype: dtype of the base weights.
        attention: attention implementation.
        quantization: ``nf4`` for 4-bit base weights.
        max_new_tokens: length of generated answers.

    Raises:
        AdapterError: the adapter cannot be read, or names another base.
        OutputExistsError: ``output`` has a results.json and ``overwrite`` is false.
    """

    def __init__(
        self,
        base: str = "smollm2-135m",
        adapter: str | None = None,
        output: str | None = None,
        cache: str | None = None,
        overwrite: bool = False,
        dtype: Dtype = "bfloat16",
        attention: Attention = "auto",
        quantization: Quantization | None = None,
        max_new_tokens: int = 24,
    ) -> None:
        super().__init__(base, dtype, attention, quantization, max_new_tokens)
        self.adapter = None if adapter is None else LoraAdapter.load(Path(adapter))
        if self.adapter is not None:
            check_base_name(self.adapter, base)
        self.output = None if output is None else Path(output)
        if self.output is not None:
            refuse_overwrite(self.output / "results.json", overwrite, "model.overwrite: true")
        self.cache = Path(cache) if cache else self.output and self.output / "outputs"

    def build_model(self) -> PreTrainedModel | PeftModel:
        """Load the base and, through PEFT, the adapter.

        Raises:
            AdapterError: the adapter was trained on another model.
        """
        model = self.load_base()
        if self.adapter is None:
            return model
        check_shapes(self.adapter, model)
        return PeftModel.from_pretrained(model, self.adapter.path)  # type: ignore[arg-type]

    def on_test_epoch_start(self) -> None:
        """Open the store of this model's outputs, and fresh metrics."""
        if self.cache is not None:
            assert self.model is not None
            base = self.base_fingerprint()
            weights = "base" if self.adapter is None else self.adapter.fingerprint
            self.output_store = self.open_store(self.cache, base, weights, self.trainer)
        super().on_test_epoch_start()

    def on_test_epoch_end(self) -> None:
        """Log the metrics, and write results, examples and report."""
        super().on_test_epoch_end()
        datamodule = self.trainer.datamodule  # type: ignore[attr-defined]
        scores = self.scores([task.name for task in datamodule.evaluation_tasks])
        if self.output is not None:
            output = self.output
            on_rank_zero(lambda: self._write(scores, output), self.trainer)

    def _write(self, scores: ModelScores, output: Path) -> None:
        assert self.suites is not None
        assert self.model is not None
        datamodule = self.trainer.datamodule  # type: ignore[attr-defined]
        name = "base" if self.adapter is None else str(self.adapter.path)
        recipe = None if self.adapter is None else {"adapter_sha256": self.adapter.fingerprint}
        candidate = Candidate(
            model=name,
            method="base" if self.adapter is None else "adapter",
            parameters={},
            scores=scores,
            diagnostics={},
            provenance=provenance(
                self.base_fingerprint(),
                self.evaluation_settings(datamodule.evaluation_tasks, self.trainer),
                recipe,
            ),
        )
        records = build_records(
            [candidate],
            setting="test",
            utility_tasks=list(datamodule.utility),
            rows=datamodule.test_rows(),
            suites=suite_facts(datamodule.evaluation_tasks, self.suites.judges),
        )
        # What an earlier run left is about another model, or other suites.
        remove_outputs(output, ("results.json", "report.md", SUITES_FIGURE, EXAMPLES))
        for task, examples in scores.examples.items():
            write_examples(output / EXAMPLES / f"{task}.jsonl", examples)
        # Last of what other commands read: where it is, the examples are complete.
        write_records(records, output / "results.json")
        if scores.examples:
            save_figure(suites_figure(records[0]), output / SUITES_FIGURE)
            write_text(output / "report.md", suite_report(records, f"Evaluation of {name}"))
