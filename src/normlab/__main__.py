"""The command line: `python -m normlab train --norm ln --model lstm --data ptb_char --seed 3`.

Flags are the fields of `RunConfig`; `--norm`, `--model` and `--data` are short for `--model.norm`, `--model.name` and
`--data.corpus`, and `--model hf:gpt2` for `--model.name hf --model.architecture gpt2`. A config is checked before torch
is imported, so that a mistake is answered at once (what only transformers knows: before the text is read).
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import yaml

from normlab.config import (
    MODELS,
    DataConfig,
    InputError,
    OptimConfig,
    OutputConfig,
    RunConfig,
    TrainingConfig,
    available_probes,
    config_from_dict,
    require_choice,
    run_id,
)
from normlab.machine.imports import without_collecting
from normlab.machine.processes import ProcessError, place_in_run, says_mistakes
from normlab.machine.terminal import printable
from normlab.records.disk import read_yaml

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace

SHORT = {"--norm": "--model.norm", "--model": "--model.name", "--data": "--data.corpus"}

EXIT_INPUT = 2
EXIT_CODES = {"interrupted": 130, "failed": EXIT_INPUT}
AFTER_A_STOP = {
    "train": "; the same command goes on from the last checkpoint",
    "probe": "; the same command measures anew",
}

HELP = """\
usage: python -m normlab COMMAND ...

commands:
  train   train one run and record it      python -m normlab train --norm ln --model lstm --data pydocs
  show    show the record of a run         python -m normlab show RUN
  status  how far all runs are             python -m normlab status [--watch]
  watch   curves, or the live table        python -m normlab watch
  study   run what an argument misses      python -m normlab study [CLAIM]
  exact   compute the exact arguments      python -m normlab exact
  probe   measure on a finished run        python -m normlab probe NAME RUN
  report  verdicts on all arguments        python -m normlab report

python -m normlab COMMAND --help says more; `make` lists what make can do."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return the exit code: 0, 2 for wrong input, 130 after Ctrl-C."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    commands = {
        "train": _train,
        "show": _show,
        "status": _status,
        "watch": _watch,
        "probe": _probe,
        "study": _study,
        "report": _report,
        "exact": _exact,
    }
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(HELP)
        return 0
    try:
        require_choice("command", arguments[0], commands)
        return commands[arguments[0]](arguments[1:])
    except InputError as error:
        if says_mistakes() or isinstance(error, ProcessError):
            print(f"normlab: error: {printable(str(error))}", file=sys.stderr)
        return EXIT_INPUT
    except KeyboardInterrupt:
        print(f"normlab: stopped{AFTER_A_STOP.get(arguments[0], '')}", file=sys.stderr)
        return EXIT_CODES["interrupted"]


def _train(arguments: list[str]) -> int:
    config = parse_run(arguments)
    place = place_in_run(config.training.devices)
    from normlab.data.corpora import require_corpus

    require_corpus(config.data)
    from normlab.records.summary import show

    with without_collecting():
        from normlab.training.run import train

    record = train(config)
    if not place.is_first:
        return 0  # the first one says how the run ended
    show(record)
    return _exit_code(record.outcome().state, record.outcome().reason)


def _show(arguments: list[str]) -> int:
    parser = _parser("show", "Show the record of a run.")
    parser.add_argument("run", type=str, help="id in the runs folder, or the folder of the record")
    parser.add_argument("--runs_dir", type=str, default="runs", help="folder of records")
    options = _parse(parser, arguments)
    from normlab.records.record import RunRecord
    from normlab.records.summary import show

    show(RunRecord.open(options.run, options.runs_dir))
    return 0


def _status(arguments: list[str]) -> int:
    from normlab.records.status import Sort, Wanted, show_json, show_status, watch_status

    parser = _parser("status", "How far all runs are: state, progress, losses, time left. Right while they run.")
    parser.add_argument("runs_dir", type=str, nargs="?", default="runs", help="folder of records")
    parser.add_argument("--state", type=str, default="", help="such as running,failed; empty takes all but archived")
    parser.add_argument("--claim", type=str, default="", help="id of an argument or the beginning of one, such as d2")
    parser.add_argument(
        "--sort", type=Sort, default="state", help="state (under way first), run, loss (valid) or time (latest first)"
    )
    parser.add_argument(
        "--limit", type=int | None, default=None, help="most runs to show, 0 for all; null: 50, in a pipe all"
    )
    parser.add_argument("--watch", action="store_true", help="go on showing them until Ctrl-C")
    parser.add_argument("--every", type=float, default=2.0, help="seconds between two looks of --watch")
    parser.add_argument("--json", action="store_true", help="print JSON instead")
    options = _parse(parser, arguments)
    states = tuple(state.strip() for state in options.state.split(",") if state.strip())
    wanted, runs_dir = Wanted(states, options.claim, options.sort, options.limit), Path(options.runs_dir)
    if options.json and options.watch:
        raise InputError("--json prints once; leave out --watch")
    if options.json:
        show_json(runs_dir, wanted)
    elif options.watch:
        watch_status(runs_dir, wanted, options.every)
    else:
        show_status(runs_dir, wanted)
    return 0


def _watch(arguments: list[str]) -> int:
    parser = _parser(
        "watch",
        "The curves of runs that W&B mirrors, in its terminal viewer; if it does not mirror all that is under way, "
        "the table of status, live.",
    )
    parser.add_argument("runs_dir", type=str, nargs="?", default="runs", help="folder of records")
    runs_dir = Path(_parse(parser, arguments).runs_dir)
    from normlab.records.progress import RunsFolder
    from normlab.records.status import Wanted, are_mirrored, watch_status

    statuses, _ = RunsFolder(runs_dir).look()
    program = Path(sys.executable).with_name("wandb")
    if are_mirrored(statuses) and (runs_dir / "wandb").is_dir() and program.exists():
        os.execv(program, [str(program), "leet", str(runs_dir / "wandb")])
    hint = "curves: W&B mirrors not all of these runs; a study has it with --wandb offline (make study: in ARGS)"
    watch_status(runs_dir, Wanted(), every=2.0, hint=hint)
    return 0


def _probe(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        from normlab.probes.listing import show_probes

        show_probes()
        return 0
    name, *rest = arguments
    require_choice("probe", name, available_probes())
    from normlab.probes.base import probe_class

    cls = probe_class(name)
    parser = _parser(f"probe {name}", cls.__doc__)
    parser.add_argument("runs", type=str, nargs="*", help="ids in the runs folder, or folders of records")
    parser.add_argument("--runs_dir", type=str, default="runs", help="folder of records")
    parser.add_class_arguments(cls, as_group=False)
    options = _parse(parser, rest).as_dict()
    runs, runs_dir = options.pop("runs"), options.pop("runs_dir")
    from normlab.probes.listing import show_measurement
    from normlab.records.record import RunRecord
    from normlab.records.wandb_mirror import mirror_probes
    from normlab.training.probing import run_probe

    measured = run_probe(cls(**options), runs, runs_dir=runs_dir)
    show_measurement(measured)
    mirror = mirror_probes([name], [RunRecord.open(run, runs_dir) for run in runs])
    if mirror is not None and mirror.where():
        print(mirror.where())
    return 0


def _study(arguments: list[str]) -> int:
    parser = _parser(
        "study",
        "Run what an argument still misses, and write its table of results; without one, list all.",
    )
    parser.add_argument("claim", type=str, nargs="?", help="id or the beginning of one, letter of a section, or all")
    parser.add_argument(
        "--scale", type=Literal["small", "full"], default="small", help="small (CPU, minutes) or full (one GPU)"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the runs instead")
    parser.add_argument(
        "--where",
        type=Literal["local", "slurm"],
        default="local",
        help="local (processes on this machine) or slurm (jobs of a cluster: docs/running.md)",
    )
    parser.add_argument(
        "--workers", type=int, default=0, help="runs at once, at most, with slurm in each job; 0 takes one per core"
    )
    parser.add_argument("--runs-per-gpu", type=int, default=0, help="at scale full; 0 has it measured")
    parser.add_argument(
        "--stack", type=int, default=0, help="runs trained as one model; 0: several where that is faster, 1: never"
    )
    parser.add_argument("--wandb", type=Literal["auto", "online", "offline", "off"], default="off", help="as of train")
    parser.add_argument("--runs_dir", type=str, default="runs", help="folder of records")
    parser.add_argument("--results_dir", type=str, default="results", help="folder of the tables")
    from normlab.execution.engine import ExecutionOptions, SlurmOptions

    parser.add_class_arguments(SlurmOptions, "slurm")
    options = _parse(parser, arguments)
    from normlab.study.command import study

    output = OutputConfig(runs_dir=options.runs_dir, wandb=options.wandb, progress=False)
    values = options.slurm.as_dict()
    values.pop("__path__", None)  # of a file given as --slurm
    slurm = SlurmOptions(**values)
    execution = ExecutionOptions(options.where, options.workers, options.runs_per_gpu, slurm, options.stack)
    return study(options.claim, options.scale, output, Path(options.results_dir), execution, dry_run=options.dry_run)


def _exact(arguments: list[str]) -> int:
    parser = _parser(
        "exact",
        "Compute what is true or false by mathematics and write exact.json; exit code 1 if a bound breaks.",
    )
    parser.add_argument("--results_dir", type=str, default="results", help="folder of exact.json")
    options = _parse(parser, arguments)
    from normlab.exact import checks
    from normlab.records.checks import write_checks

    found = checks()
    for check in found:
        print(f"{'holds' if check.holds else 'broken':6}  {check.name}: {check.value:.3g} ({check.bound})")
    path = Path(options.results_dir) / "exact.json"
    write_checks(path, found)
    print(f"{sum(check.holds for check in found)} of {len(found)} hold; {path}")
    return 0 if all(check.holds for check in found) else 1


def _report(arguments: list[str]) -> int:
    parser = _parser(
        "report",
        "Judge all arguments from their tables, and write report.html, report.md and the README's table.",
    )
    parser.add_argument("--results", type=str, default="results", help="folder of the tables")
    parser.add_argument("--output", type=str, default="", help="folder of the report; empty takes that of the tables")
    parser.add_argument("--readme", type=str, default="README.md", help="whose table is filled; none leaves it")
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit code 1 if they differ from the tables"
    )
    options = _parse(parser, arguments)
    from normlab.claims import available_claims, load_claim
    from normlab.report.command import report

    claims = [load_claim(name) for name in available_claims()]
    readme = None if options.readme == "none" else Path(options.readme)
    results, output = Path(options.results), Path(options.output or options.results)
    return report(claims, results, output, readme, check=options.check)


def _exit_code(state: str, reason: str) -> int:
    return 143 if reason == "SIGTERM" else EXIT_CODES.get(state, 0)


def parse_run(arguments: Sequence[str]) -> RunConfig:
    """The config that the command line (and the file given with `--config`) asks for.

    Raises:
        InputError: naming the field, what was given and what it takes.
    """
    spelled = _spell_out(arguments)
    parser = run_parser(_model_name(spelled))
    options = _parse(parser, spelled)
    resume = options.pop("resume", None)
    options.pop("config", None)
    if resume is not None:
        return _resumed(resume, spelled, options)
    return config_from_dict(options.as_dict())


def run_parser(model: str) -> ArgumentParser:
    """A parser with one flag per field of `RunConfig`, for the model of that name."""
    parser = _parser(
        "train",
        f"Train one run and record it. These are the flags of --model {model}; for those of the others: "
        f"{', '.join(f'--model {name} --help' for name in MODELS if name != model)}. "
        "Short: --norm, --model and --data for --model.norm, --model.name and --data.corpus; "
        "--model hf:gpt2 for --model.name hf --model.architecture gpt2.",
    )
    parser.add_argument("--config", action="config", help="a YAML file with these fields; later flags change it")
    parser.add_argument("--resume", type=str, metavar="RUN", help="go on with this run: its id or folder")
    parser.add_argument("--seed", type=int, default=RunConfig.seed, help="of initial weights, batch order and dropout")
    parser.add_class_arguments(MODELS[model], "model")
    for name, cls in (
        ("data", DataConfig),
        ("optim", OptimConfig),
        ("training", TrainingConfig),
        ("output", OutputConfig),
    ):
        parser.add_class_arguments(cls, name)
    return parser


def _spell_out(arguments: Sequence[str]) -> list[str]:
    """The arguments with the fields' own names in place of short ones."""
    spelled: list[str] = []
    for argument in arguments:
        name, equals, value = argument.partition("=")
        spelled.append(SHORT.get(name, name) + equals + value)
        if len(spelled) > 1 and spelled[-2] == "--model.name" and argument.startswith("hf:"):
            spelled[-1:] = ["hf", "--model.architecture", argument[3:]]
        elif spelled[-1].startswith("--model.name=hf:"):
            spelled[-1:] = ["--model.name=hf", f"--model.architecture={value[3:]}"]
    return spelled


def _model_name(arguments: Sequence[str]) -> str:
    """The model whose flags the parser must have: the last one named, on the command line or in the config file."""
    name = "lstm"
    for flag, value in zip(arguments, [*arguments[1:], ""], strict=True):
        if "=" in flag:
            flag, _, value = flag.partition("=")
        if flag == "--config":
            name = _model_in_file(Path(value)) or name
        elif flag == "--model.name":
            name = value
    require_choice("model", name, MODELS)
    return name


def _model_in_file(path: Path) -> str | None:
    try:
        values = read_yaml(path)
    except OSError as error:
        raise InputError(f"cannot read the config {str(path)!r}: {error.strerror}; configs/ holds some") from None
    except UnicodeDecodeError as error:
        raise InputError(f"the config {path} is not UTF-8 text (byte {error.start})") from None
    except yaml.YAMLError as error:
        raise InputError(f"the config {path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise InputError(f"the config {path} holds no fields; see configs/ for examples")
    for field in values:
        require_choice(f"field in {path}:", str(field), [part.name for part in fields(RunConfig)])
    model = values.get("model")
    return str(model["name"]) if isinstance(model, dict) and "name" in model else None


def _resumed(run: str, arguments: Sequence[str], options: Namespace) -> RunConfig:
    from normlab.records.record import RunRecord

    changed = [a for a in arguments if a.startswith("--") and not a.startswith(("--resume", "--output."))]
    if changed:
        raise InputError(f"--resume takes the run's own config; drop {changed[0]} (only --output.* may be added)")
    record = RunRecord.open(run, options.output.runs_dir)
    if record.id != run_id(record.config):
        raise InputError(
            f"{record.folder} was renamed, archived or edited: its config is that of {run_id(record.config)}; "
            "give it that name to go on with it"
        )
    if record.outcome().state == "running":
        raise InputError(f"run {record.id} is still running; wait for it to end")
    given = {a[len("--output.") :].partition("=")[0] for a in arguments if a.startswith("--output.")}
    output = replace(record.config.output, **{name: getattr(options.output, name) for name in given})
    return replace(record.config, output=replace(output, runs_dir=str(record.folder.parent)))


def _parser(command: str, description: str | None) -> ArgumentParser:
    try:
        from jsonargparse import ArgumentParser, set_parsing_settings
    except ImportError:
        raise InputError(
            "the command line needs jsonargparse: pip install 'jsonargparse[signatures]' (normlab.train needs none)"
        ) from None
    # Else a config with a `class_path` anywhere in model.overrides has the module of that name imported, which runs it.
    set_parsing_settings(import_path_denylist=["*"])
    return ArgumentParser(
        prog=f"python -m normlab {command}", description=description, exit_on_error=False, allow_abbrev=False
    )


def _parse(parser: ArgumentParser, arguments: Sequence[str]) -> Namespace:
    from jsonargparse import ArgumentError

    try:
        return parser.parse_args(list(arguments))
    except (ArgumentError, ImportError) as error:  # ImportError: a value names something to import
        raise InputError(_one_line(parser, str(error))) from None


def _one_line(parser: ArgumentParser, message: str) -> str:
    """jsonargparse's message in one line that says what is wrong and what would be right."""
    unknown = re.match(r"unrecognized arguments: (\S+)", message)
    if unknown is not None:
        flag = unknown[1].partition("=")[0]
        flags = [name for action in parser._actions for name in action.option_strings if name.startswith("--")]
        known = flag.rpartition(".")[0]
        while known and not any(name.startswith(f"{known}.") for name in flags):
            known = known.rpartition(".")[0]
        group = [name for name in flags if name.startswith(f"{known}.") and known]
        short = [*SHORT, *(name for name in flags if "." not in name and not name.startswith("--print"))]
        named = [name for name in flags if name.rpartition(".")[2] == flag.lstrip("-")]
        try:
            require_choice("flag" if flag.startswith("-") else "argument", flag, group or [*short, *named])
        except InputError as error:
            return str(error)
    imported = re.search(r"Importing '([^']*)' is not allowed", message)
    if imported is not None:
        return f"{imported[1]!r} stands where fields are expected; a config holds values and has nothing imported"
    choice = re.search(r'key "([^"]+)":.*?Literal\[([^]]*)\].*value: (\S+)', message, re.DOTALL)
    if choice is not None:
        key, choices, got = choice.groups()
        return f"{key} must be one of {choices.replace(chr(39), '')}, not {got!r}"
    union = re.search(r'key "([^"]+)":.*?Subtypes: \[(.*?)\] Errors.*value: (.*)', " ".join(message.split()))
    if union is not None:
        key, wanted, got = union.groups()
        kinds = [kind for kind in re.findall(r"(?:class '|)(\w+)'?>?(?:, |$)", wanted) if kind != "NoneType"]
        return f"{key} must be {' or '.join(kinds)} or null, not {got!r}"
    wrong = re.search(r'key "([^"]+)":\s+Expected an? (.*)\. Got value: (.*)', message, re.DOTALL)
    if wrong is not None:
        key, wanted, got = wrong.groups()
        wanted = re.sub(r"<class '(\w+)'>", r"\1", wanted)
        return f"{key} must be {wanted}, not {' '.join(got.split())!r}"
    return " ".join(message.split())


if __name__ == "__main__":
    sys.exit(main())
