"""The command line: `wm COMMAND [key=value ...]`."""

import signal
import sys
from collections.abc import Callable, Sequence

from wm import WMError

USAGE = """usage: wm COMMAND [env=GAME] [scale=SCALE] [key=value ...]

  run          all stages in order; those that are done are skipped
  collect      play and keep episodes of the real game
  vision       train V, the VAE
  memory       train M, the mixture-density LSTM
  controller   evolve C
  baseline     score the random policy on held-out seeds
  evaluate     score the agent on held-out seeds; run=ID scores any MLflow run or agent folder
  report       write the HTML page
  parity       compare EnvPool with the official CarRacing; run=ID adds an agent's scores
  config       print the resolved configuration
  bench        time the parts beside what they are measured against (under 10 minutes);
               run=ID only says what bfloat16 does to the ranks of an agent's candidates

for instance: wm run env=takecover scale=laptop controller.temperature=1.15 seed=3"""


def run(words: Sequence[str]) -> None:
    from wm.worldmodels import pipeline

    pipeline.run(words)


def stage(name: str) -> Callable[[Sequence[str]], None]:
    def command(words: Sequence[str]) -> None:
        from wm.worldmodels import pipeline

        pipeline.run_only(name, words)

    return command


def evaluate(words: Sequence[str]) -> None:
    from wm.worldmodels import pipeline

    chosen, others = split_run(words)
    if chosen:
        pipeline.evaluate_run(chosen, others)
    else:
        pipeline.run_only("evaluate", others)


def parity(words: Sequence[str]) -> None:
    from wm.worldmodels import pipeline

    pipeline.compare_simulators(*split_run(words))


def split_run(words: Sequence[str]) -> tuple[str | None, list[str]]:
    """The last run=ID, if any, and the other words."""
    chosen = [word.removeprefix("run=") for word in words if word.startswith("run=")]
    return chosen[-1] if chosen else None, [word for word in words if not word.startswith("run=")]


def config(words: Sequence[str]) -> None:
    from wm.config import load, to_yaml
    from wm.worldmodels.pipeline import Config

    print(to_yaml(load(Config, words)), end="")


def bench(words: Sequence[str]) -> None:
    from pathlib import Path

    from wm.config import load
    from wm.worldmodels.bench.ranks import bench_ranks
    from wm.worldmodels.bench.run import bench
    from wm.worldmodels.pipeline import Config

    chosen, others = split_run(words)
    runs = Path(load(Config, others).runs)
    if chosen:
        bench_ranks(chosen, runs)
    else:
        bench(runs)


COMMANDS = {
    "run": run,
    "collect": stage("collect"),
    "vision": stage("vision"),
    "memory": stage("memory"),
    "controller": stage("controller"),
    "baseline": stage("baseline"),
    "evaluate": evaluate,
    "report": stage("report"),
    "parity": parity,
    "config": config,
    "bench": bench,
}


def main() -> None:
    name, *words = sys.argv[1:] or ["help"]
    if name not in COMMANDS:
        print(USAGE)
        sys.exit(0 if name in ("help", "-h", "--help") else 2)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        COMMANDS[name](words)
    except WMError as error:
        print(f"wm: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\nwm: interrupted; the same command goes on from here", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
