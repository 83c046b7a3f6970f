"""`sparse-gen sweep`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sparse_gen.cli.errors import one_line_errors
from sparse_gen.cli.signals import Interrupted, stop_on_signal

if TYPE_CHECKING:
    from sparse_gen.experiments.sweep_folder import Status

SOME_FAILED = 1
EXAMPLE = "Example: sparse-gen sweep run examples/sweep.yaml -o comparison"
PLAN = """\
images: [astronaut_256.png]   # relative to this file
sigmas: [0.1]                 # of the noise
seeds: [0, 1, 2]
densities: [0.05]
generators: [hourglass]       # or skip, decoder, or name: {generator: skip, depth: 4, ...}
budget: 2500                  # steps of every method, its search included
methods:
  OES:    {method: oes, search_steps: 1000, lr: 1e-2}
  random: {method: random, lr: 1e-2}
  dense:  {method: dense, lr: 1e-3, stop: wmv}
"""
_HELP = f"""Do every experiment of a plan that is not done yet.

A plan is a YAML file, such as

\b
{PLAN}
Methods are dense, oes, imp, magnitude, random, snip, grasp and synflow, with the options prunable, scope and floor, and
rounds of imp and synflow. All get the same noisy images, network inputs and initial weights, and the same number of
steps; those that finding a mask takes, or passes over the network, are part of it.

What is done is skipped, so the same command goes on with a sweep that was stopped or killed.
""".replace("[", "\\[")  # to rich, [ begins markup

app = typer.Typer(help="Run and compare many experiments.", epilog=EXAMPLE, no_args_is_help=True)
_Folder = Annotated[Path, typer.Argument(help="Folder of the sweep.", show_default=False)]


@app.command("run", epilog=EXAMPLE, help=_HELP)
@one_line_errors
def run(
    plan: Annotated[
        Path | None, typer.Argument(help="YAML file. Default: that of the folder, to go on.", show_default=False)
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder for the results. Required.", show_default=False)
    ] = None,
    workers: Annotated[
        int | None, typer.Option(help="Processes. Default: as many as there are processors for.", show_default=False)
    ] = None,
    together: Annotated[
        int, typer.Option(help="Like experiments that run at the same time, to fill a GPU.", metavar="NUMBER")
    ] = 1,
    retries: Annotated[int, typer.Option(help="Times that a crashed experiment is tried again.")] = 2,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Try those again that failed before.")] = False,
    engine: Annotated[
        str | None,
        typer.Option(help="auto, or reference: plain PyTorch. Default: that of the plan, or auto.", show_default=False),
    ] = None,
    checkpoint_seconds: Annotated[
        float, typer.Option(help="Store where each experiment is this often.", metavar="NUMBER")
    ] = 60,
) -> None:
    from threading import Event

    from sparse_gen.cli.progress import SweepBar
    from sparse_gen.experiments.plan import Plan
    from sparse_gen.experiments.sweep import sweep
    from sparse_gen.experiments.sweep_folder import SweepFolder

    if output is None:
        raise ValueError("output: expected a folder for the results, got none, add -o DIR")
    todo = SweepFolder.open(output).plan if plan is None else Plan.load(plan)
    todo = todo if engine is None else todo.replace(engine=engine)
    again = f"go on with: sparse-gen sweep run -o {shlex.quote(str(output))}"
    stop = Event()
    with stop_on_signal(stop.set) as received:
        try:
            with SweepBar() as bar:
                status = sweep(
                    todo,
                    output,
                    workers=workers,
                    together=together,
                    retries=retries,
                    retry_failed=retry_failed,
                    checkpoint_seconds=checkpoint_seconds,
                    stop=stop,
                    progress=bar,
                )
        except Interrupted as error:
            raise Interrupted(error.code, f"interrupted; {again}") from None
        if status.left:
            raise Interrupted(
                received.code, f"stopped with {status.done + status.failed} of {status.total} done; {again}"
            )
    _print(status)
    files, missing = SweepFolder(output).merge()
    print(*files, *([missing] if missing else []), sep="\n")
    print(f"compare with: sparse-gen sweep table {shlex.quote(str(output))}")
    if status.failed:
        raise typer.Exit(SOME_FAILED)


@app.command("status", epilog="Example: sparse-gen sweep status comparison")
@one_line_errors
def status(folder: _Folder) -> None:
    """Say how many experiments are done, running and left, how long it will take, and what failed."""
    from sparse_gen.experiments.sweep_folder import SweepFolder

    _print(SweepFolder.open(folder).status())


@app.command("table", epilog="Example: sparse-gen sweep table comparison")
@one_line_errors
def table(folder: _Folder) -> None:
    """Compare the methods: mean and spread over seeds; written as table.csv and table.md."""
    from sparse_gen.experiments.shards import write_csv
    from sparse_gen.experiments.sweep_folder import SweepFolder
    from sparse_gen.experiments.table import group, markdown, table_rows
    from sparse_gen.files import atomic_write

    sweep = SweepFolder.open(folder)
    experiments = sweep.experiments()
    groups = group(experiments, sweep.rows({experiment.key: experiment for experiment in experiments}))
    text = markdown(groups)
    write_csv(folder / "table.csv", table_rows(groups))
    with atomic_write(folder / "table.md", "w") as file:
        file.write(text)
    print(text)
    files, missing = sweep.merge()
    print(folder / "table.csv", folder / "table.md", *files, *([missing] if missing else []), sep="\n")


def _print(status: Status) -> None:
    from sparse_gen.cli.times import format_seconds

    lines = {"done": f"{status.done} of {status.total}", "running": str(status.running), "left": str(status.left)}
    if status.interrupted:
        lines["interrupted"] = str(status.interrupted)
    if status.left:
        seconds = status.seconds_left
        lines["time left"] = "unknown" if seconds is None else f"about {format_seconds(seconds)}"
    lines["failed"] = str(status.failed)
    for name, text in lines.items():
        print(f"{name:<13}{text}")
    for experiment, reason in status.reasons:
        where = f"{experiment.image}, σ {experiment.config.sigma:g}, {experiment.generator}, {experiment.method}"
        print(f"failed: {where}, density {experiment.config.density:g}, seed {experiment.config.seed}: {reason}")
