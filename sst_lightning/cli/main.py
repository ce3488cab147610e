"""The program ``sst-merge``: Lightning's subcommands, merge, compare, and the ones beside them."""

import logging
import os
import signal
import sys
from collections.abc import Sequence

from sst_lightning.algebra.errors import SSTMergeError
from sst_lightning.algebra.files import disk_is_full

EPILOGUE = """
also available (each has its own --help):
    demo                the whole story on SmolLM2-135M: fit, Fisher, merge, test, report
    study               the same for a YAML recipe of your own
    report              draw report.md and report.html again from a results.json
    merge-files         merge adapter folders without the base model, module by module
    export              write base and adapter as full weights, and say what precision was lost
    paired              compare tested models with one of them, item by item
    plan-eval           how many items a difference needs, or what given items show
    plan                memory and disk of a stage, and what to change where it does not fit
    methods             list the merge methods, or explain one
    configs             list the YAML files that come with the program, or copy them

in short: test --base X --adapter X --output X --overwrite stand for --model.base X and so on,
--allow-code-execution for --data.allow_code_execution=true (HumanEval)
"""

# Options that mean true when they stand alone; jsonargparse wants a value for every bool.
SWITCHES = (
    *("--fresh", "--overwrite", "--evaluate", "--markdown", "--allow_code_execution"),
    *("--common", "--json"),
)

# What `test` is asked for most often, in short.
TEST_SHORTCUTS = {
    "--base": "--model.base",
    "--adapter": "--model.adapter",
    "--output": "--model.output",
    "--overwrite": "--model.overwrite",
    "--allow_code_execution": "--data.allow_code_execution",
}

# What is said after a signal.
HOW_TO_GO_ON = {
    "fit": "run the same command with --ckpt_path last",
    "validate": "run the same command again: blocks of Fishers that were written are not repeated",
    "merge": "run the same command with --overwrite: evaluations that are finished are not repeated",
    "compare": "run the same command with --overwrite: evaluations that are finished are not repeated",
    "test": "run the same command again: answers under the output are not repeated",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; errors the user can act on are printed without a traceback.

    Args:
        arguments: command line without the program's name; ``sys.argv`` when not given.

    Returns:
        0 when the work is complete, 2 when it failed for a reason the user can remove (wrong input,
        a full disk, a loss that is not finite), 130 after Ctrl-C and 143 after SIGTERM. Defects of
        the program are raised.
    """
    arguments = expand_shortcuts(
        complete_switches(sys.argv[1:] if arguments is None else arguments)
    )
    # Set before transformers is imported: fork-after-tokenizers warnings and hub progress bars
    # would run through the Trainer's own bar.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # bitsandbytes warns at import, on every CPU, of an optional kernel that nothing here uses.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    from sst_lightning.modules.interruption import Interrupted, interruptible

    try:
        with interruptible():
            _dispatch(arguments)
    except (KeyboardInterrupt, SystemExit) as stop:
        # Lightning makes 1 of Ctrl-C.
        if isinstance(stop, KeyboardInterrupt) or isinstance(stop.__context__, KeyboardInterrupt):
            stop = Interrupted(signal.SIGINT)
        if not isinstance(stop, Interrupted):
            raise
        from lightning.pytorch.utilities import rank_zero_only

        how = HOW_TO_GO_ON.get(arguments[0], "run the same command again")
        rank_zero_only(print)(f"sst-merge: {stop}; to go on, {how}", file=sys.stderr)
        return 128 + stop.number
    except Exception as error:
        message = _message(error)
        if message is None:
            raise
        print(f"sst-merge: error: {message}", file=sys.stderr)
        return 2
    return 0


def _message(error: BaseException) -> str | None:
    """What to tell the user of an error that is not a defect of the program."""
    from lightning.pytorch.utilities.exceptions import MisconfigurationException

    ours = (SSTMergeError, MisconfigurationException, FloatingPointError)
    # jsonargparse wraps what a class raises while the command line builds it.
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ours):
            return str(cause)
        if isinstance(cause, OSError) and disk_is_full(cause):
            return f"a disk is full: {cause}. Free space and run again"
        cause = cause.__cause__ or cause.__context__
    return None


def complete_switches(arguments: Sequence[str]) -> list[str]:
    """Write ``--overwrite`` without a value (also ``--model.overwrite``) as ``--overwrite=true``."""
    result = []
    for argument, following in zip(arguments, [*arguments, "--"][1:], strict=True):
        if argument.startswith("--"):
            # --max-utility-drop is --max_utility_drop; values after "=" stay as they are.
            key, equals, value = argument.partition("=")
            argument = "--" + key[2:].replace("-", "_") + equals + value
        name = "--" + argument.rpartition(".")[2].removeprefix("--")
        # The value of --data.path=rows.json is no switch.
        option = argument.startswith("--") and "=" not in argument
        alone = option and name in SWITCHES and following.startswith("-")
        result.append(f"{argument}=true" if alone else argument)
    return result


def expand_shortcuts(arguments: list[str]) -> list[str]:
    """Write ``test --adapter X`` as ``test --model.adapter X``, and so on (``TEST_SHORTCUTS``)."""
    if arguments[:1] != ["test"]:
        return arguments
    result = []
    for argument in arguments:
        option, equals, value = argument.partition("=")
        result.append(TEST_SHORTCUTS.get(option, option) + equals + value)
    return result


def _dispatch(arguments: list[str]) -> None:
    command = arguments[0] if arguments else "--help"
    if command in (
        *("demo", "study", "report", "merge-files", "export", "paired"),
        *("plan-eval", "plan", "methods", "configs"),
    ):
        from sst_lightning.cli import commands

        commands.run(command, arguments[1:])
        return
    from sst_lightning.cli.lightning_cli import run_lightning

    if command in ("-h", "--help"):
        try:
            run_lightning(["--help"])
        finally:
            print(EPILOGUE)
        return
    run_lightning(arguments)


if __name__ == "__main__":
    raise SystemExit(main())
