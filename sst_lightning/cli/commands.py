"""The subcommands that need no model on the command line, from demo to plan-eval."""

import shutil
from collections.abc import Callable, Sequence
from html import unescape
from inspect import Parameter, signature
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

from jsonargparse import ArgumentParser, lazy_instance

from sst_lightning.algebra.adapter import LoraAdapter
from sst_lightning.algebra.errors import SSTMergeError
from sst_lightning.algebra.files import atomic_folder, refuse_overwrite
from sst_lightning.algebra.methods import MergeMethod, TaskArithmetic
from sst_lightning.algebra.peft_folder import refuse_replacing
from sst_lightning.algebra.rank import RankRule
from sst_lightning.cli.method_names import complete_method_names
from sst_lightning.cli.shipped_configs import shipped_configs, shipped_folder
from sst_lightning.report.recipe import merge_recipe, write_recipe

LISTS = {
    "results": "one or more results.json files",
    "utility": "folders of one or more utility adapters",
    "models": "output folders of sst-merge test",
    "metrics": "metrics that are tested, in place of the primary one of each suite",
    "config": "one or more YAML files of fit, validate, merge or test",
    "set": "key=value that take the place of the files' values, such as data.batch_size=2",
    "runs": "two output folders of sst-merge test, whose rates and discordance are used",
}


def demo(
    profile: Literal["default", "full", "methods", "ci"] = "default",
    output: str | None = None,
    seed: int | None = None,
    fresh: bool = False,
) -> None:
    """The whole story on SmolLM2-135M-Instruct: fit, Fisher, merge, test, report.

    Args:
        profile: ``default`` is made for two CPU cores, ``full`` uses more rows and α values,
            ``methods`` compares all merge methods, ``ci`` is the smallest one.
        output: folder for adapters, logs and the report (``runs/demo`` in the recipes).
        seed: seed of every stage (0 in the recipes).
        fresh: delete finished stages and start over.
    """
    study(f"demo/{profile}.yaml", output, seed, fresh)


def study(
    config: str, output: str | None = None, seed: int | None = None, fresh: bool = False
) -> None:
    """Run a YAML recipe of fit and compare stages into one report.

    Args:
        config: recipe; see configs/demo/default.yaml for the keys.
        output: folder that takes the place of the recipe's.
        seed: seed that takes the place of the recipe's.
        fresh: delete finished stages and start over.
    """
    from sst_lightning.cli.study import load_study, run_study

    folder, title, stages = load_study(config, output, seed)
    run_study(folder, title, stages, fresh)


def report(
    results: list[str], output: str, title: str = "SST-Merge", overwrite: bool = False
) -> None:
    """Draw report.md, report.html and figures from results.json files.

    Args:
        results: one or more results.json files.
        output: folder for the report.
        title: heading of the report.
        overwrite: replace a report that is already in ``output``.
    """
    from sst_lightning.report.records import read_records
    from sst_lightning.report.report import write_report

    records = [record for path in results for record in read_records(Path(path))]
    refuse_overwrite(Path(output) / "report.md", overwrite)
    print(write_report(records, Path(output), title))


def merge_files(
    utility: list[str],
    safety: str,
    output: str,
    method: MergeMethod = lazy_instance(TaskArithmetic),  # type: ignore[assignment]  # noqa: B008
    alpha: float | None = None,
    utility_weights: list[float] | None = None,
    rank: int | Literal["full"] | None = None,
    energy: float | None = None,
    fisher: str | None = None,
    overwrite: bool = False,
) -> None:
    """Merge adapter folders module by module, without the base model: nothing is measured.

    Args:
        safety: folder of the safety adapter.
        output: folder for the merged PEFT adapter.
        method: merge method by its name (sst-merge methods lists all), without iterations.
        alpha: weight of the safety adapter; 1 when not given.
        utility_weights: weight of each utility adapter; 1 each when not given.
        rank: rank of the merged adapter (see ``sst-merge merge --help``).
        energy: share of ‖ΔW‖² that is kept in each module.
        fisher: folder of Fisher files of ``sst-merge validate``, for methods that use them.
        overwrite: replace an adapter that is already in ``output``.
    """
    from rich.progress import track

    from sst_lightning.algebra.factor_store import FactorStore
    from sst_lightning.algebra.streaming import merge_folders

    refuse_overwrite(output, overwrite)
    refuse_replacing(Path(output))
    if Path(output).resolve() in [Path(path).resolve() for path in (*utility, safety)]:
        raise SSTMergeError(f"{output} is one of the adapters to merge: choose another output")
    if not method.uses_alpha and alpha is not None:
        raise SSTMergeError(f"{method.name} does not use the safety adapter: it has no alpha")
    rule, weights = RankRule(rank, energy), tuple(utility_weights or ())
    alpha = 1.0 if alpha is None else alpha
    folder = Path(output)
    # On the output's disk: a folder for temporary files may be small, or in memory.
    disk = next(parent for parent in folder.resolve().parents if parent.is_dir())
    with TemporaryDirectory(prefix=f".{folder.name}.", dir=disk) as scratch:
        merged = merge_folders(
            utility, safety, method, alpha, rule, weights, fisher,
            lambda names: track(list(names), description=f"merging by {method.label()}"),
            FactorStore(Path(scratch)),
        )  # fmt: skip
        adapters = [LoraAdapter.open(path) for path in (*utility, safety)]
        recipe = merge_recipe(
            method,
            alpha if method.uses_alpha else None,
            rule,
            merged,
            adapters,
            weights or (1.0,) * len(utility),
        )
        with atomic_folder(folder) as temporary:
            merged.adapter.save(temporary, overwrite=True)
            write_recipe(recipe, temporary)
        rank = merged.adapter.rank
    lost = f", all but {100 * merged.discarded:.2g} % of ‖ΔW‖²" if merged.discarded else ""
    print(f"{output}: rank {rank}{lost}")


def export(
    base: str,
    adapter: str,
    output: str,
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16",
    quantization: Literal["nf4"] | None = None,
    overwrite: bool = False,
) -> None:
    """Write base and adapter as one folder of full weights, and say what precision was lost.

    Args:
        base: alias, hub id or folder of the base model; one stored in 4 bits is dequantised first.
        adapter: PEFT folder, such as that of a merge.
        output: folder for weights, config, tokenizer and export.json.
        dtype: of the weights; the sum W + ΔW is taken in fp32.
        quantization: nf4 writes the weights that an adapter of a 4-bit base was trained on.
        overwrite: replace an earlier export in ``output``.
    """
    from rich.progress import track

    from sst_lightning.modules.export import export_weights
    from sst_lightning.report.export_summary import export_summary

    record = export_weights(
        base, adapter, output, dtype, quantization, overwrite,
        lambda names: track(names, description="exporting"),
    )  # fmt: skip
    print("\n".join([f"{output}:", *(f"- {line}" for line in export_summary(record))]))


def paired(
    models: list[str],
    reference: str,
    output: str | None = None,
    metrics: list[str] | None = None,
    common: bool = False,
    overwrite: bool = False,
) -> None:
    """Compare tested models with one of them item by item: differences, intervals, p-values.

    Args:
        reference: output folder of sst-merge test of the model that the others are compared with.
        output: folder for paired.md, paired.json and a forest plot.
        common: compare on what both have where suites, items or metrics differ.
        overwrite: replace a comparison that is already in ``output``.
    """
    from sst_lightning.report.paired import compare_runs
    from sst_lightning.report.paired_report import check_output, paired_table, write_paired

    if output is not None:
        check_output(Path(output), overwrite)
    comparisons = compare_runs(models, reference, common, metrics or ())
    # The entities are for readers of Markdown.
    print(unescape(paired_table(comparisons, reference)), end="")
    if output is not None:
        write_paired(comparisons, reference, Path(output))


def plan_eval(
    effect: float | None = None,
    n: int | None = None,
    power: float = 0.8,
    alpha: float = 0.05,
    comparisons: int = 1,
    rate: float | None = None,
    discordance: float | None = None,
    design_effect: float | None = None,
    runs: list[str] | None = None,
) -> None:
    """Say how many items a wanted difference needs, or which difference given items show.

    Args:
        effect: wanted difference of rates, and half-width of an interval (0.02 is two points).
        n: number of items, in the place of ``effect``.
        power: probability of finding a difference that is there.
        alpha: level of the tests.
        comparisons: number of tests that are corrected together by Holm's method.
        rate: share of items with score 1 (0.5, the worst case, when not given).
        discordance: share of items on which the two models differ; several when not given.
        design_effect: variance with clusters over that without; 1 when not given.
    """
    from sst_lightning.cli.plan_eval import Question, assumed_setting, measured_settings, plan

    question = Question(effect, n, power, alpha, comparisons)
    if runs is None:
        print(plan(question, [assumed_setting(question, rate, discordance, design_effect)]), end="")
        return
    if len(runs) != 2:
        raise SSTMergeError(f"--runs takes two folders, got {len(runs)}")
    if not rate is discordance is design_effect is None:
        raise SSTMergeError("--runs measures what --rate, --discordance and --design-effect assume")
    print(plan(question, measured_settings(question, *runs)), end="")


def plan(
    config: list[str],
    model: str | None = None,
    stage: Literal["fit", "validate", "merge", "test"] | None = None,
    set: list[str] | None = None,
    accelerator: Literal["gpu", "cpu"] | None = None,
    memory: float | None = None,
    host_memory: float | None = None,
    tokens: int | None = None,
    labelled: int | None = None,
    rank: int = 32,
    json: bool = False,
) -> None:
    """Predict memory and disk of a stage from the model's config and the YAML alone.

    Args:
        model: base in the place of the files': alias, hub id in the cache, or folder with config.json.
        stage: the command; guessed from a file's model when not given.
        accelerator: where the model is; the Trainer's when not given, else gpu.
        memory: GiB there are for each process where the model is; says whether it fits.
        host_memory: GiB of the host there are for each process, beside a GPU.
        tokens: tokens of the longest sequences; data.max_length when not given.
        labelled: predicted positions of a sequence; all when not given.
        rank: of adapters whose folders are not there yet.
        json: print JSON.
    """
    from sst_lightning.cli.plan import Limits, as_json, as_text, plan_configs
    from sst_lightning.cli.plan_jobs import Assumptions

    limits = Limits(memory, host_memory)
    assumed = Assumptions(accelerator, tokens, labelled, rank)
    plans = plan_configs(config, model, stage, set or [], assumed)
    print(as_json(plans, limits) if json else as_text(plans, limits), end="")


def methods(name: str | None = None, markdown: bool = False) -> None:
    """List the merge methods with one line each, or explain one of them.

    Args:
        name: method to explain, such as ``ties``.
        markdown: print the documentation of all methods, docs/methods.md.
    """
    from sst_lightning.cli import method_table
    from sst_lightning.modules.methods import find_method

    if markdown:
        print(method_table.markdown(), end="")
    elif name is None:
        print("\n".join(method_table.lines()))
    else:
        method = find_method(name)
        text, arguments = method_table.description(method)
        print(f"{method.name} ({method.__name__}): {method.formula}\n{method.source}\n\n{text}\n")
        print("\n".join(f"--method.{key}: {meaning}" for key, meaning in arguments.items()))


def configs(copy_to: str | None = None) -> None:
    """List the YAML files that come with the program, or copy them.

    Args:
        copy_to: folder that gets a copy of all of them; it must be empty or new.
    """
    if copy_to is None:
        print("\n".join(shipped_configs()))
        return
    refuse_overwrite(copy_to, overwrite=False, flag="an empty folder")
    for name in shipped_configs():
        target = Path(copy_to) / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(shipped_folder() / name, target)


def run(command: str, arguments: Sequence[str]) -> None:
    """Parse ``arguments`` with the signature of ``command`` and call it."""
    functions: dict[str, Callable[..., None]] = {
        "demo": demo,
        "study": study,
        "report": report,
        "merge-files": merge_files,
        "export": export,
        "paired": paired,
        "plan-eval": plan_eval,
        "plan": plan,
        "methods": methods,
        "configs": configs,
    }
    function = functions[command]
    # Not auto_cli: its own option --config would take the study's.
    summary = str(function.__doc__).partition("\n")[0]
    parser = ArgumentParser(prog=f"sst-merge {command}", description=summary)
    parameters = signature(function).parameters
    lists: list[str | int] = [
        name for name in LISTS if name in parameters and "list[" in str(parameters[name].annotation)
    ]
    names: list[str | int] = [n for n in ("name",) if n in parameters]
    parser.add_function_arguments(function, as_group=False, skip={*lists, *names})
    for name in names:
        parser.add_argument(str(name), nargs="?", type=str, help=f"one of sst-merge {command}")
    for name in lists:
        # A list from a signature must be written as [a,b]; here --results a b works as well.
        required = parameters[str(name)].default is Parameter.empty
        parser.add_argument(
            f"--{name}", nargs="+", type=str, required=required, help=LISTS[str(name)]
        )
    parsed = parser.parse_args(complete_method_names(arguments))
    function(**parser.instantiate_classes(parsed).as_dict())
