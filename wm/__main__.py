"""The command line: `wm COMMAND [key=value ...]`."""

import errno
import signal
import sys
from collections.abc import Callable, Sequence

from wm import WMError

USAGE = """usage: wm COMMAND [env=GAME] [scale=SCALE] [key=value ...]

  run          all stages in order; those that are done are skipped
  collect      play and keep episodes of the real game
  vision       train V, the VAE
  memory       train M, the mixture-density LSTM
  controller   evolve or train C
  choice       with rounds=N, play the agent of every round on validation seeds, and keep the best
  baseline     score the random policy on held-out seeds
  evaluate     score the agent on held-out seeds; run=ID scores any MLflow run or agent folder,
               pretrained=GAME the one that `wm bundle` has kept
  report       write the HTML page
  bundle       keep the agent of a finished pipeline as the pretrained one, in half precision
  ablate       run a grid: `wm ablate ablations/NAME.yaml`; --dry-run says what would be run,
               jobs=N stages side by side, seeds=[0,1,2] others than the grid's, publish=true
               copies table and figure to ablations/NAME
  parity       compare EnvPool with the official CarRacing; run=ID adds an agent's scores
  sync         send what MLflow has not heard, because it did not answer
  config       print all keys with their values; README says where each is explained
  bench        time the parts beside what they are measured against (under 10 minutes);
               run=ID only says what bfloat16 does to the ranks of an agent's candidates

  with --repair behind its words, run or a stage looks at the hash of all that is done, and makes
  what is damaged again

for instance: wm run env=takecover scale=laptop controller.temperature=1.15 seed=3"""

OF_THE_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EIO}


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

    chosen, others = split_agent(words)
    if chosen:
        pipeline.evaluate_run(chosen, others)
    else:
        pipeline.run_only("evaluate", others)


def sync(words: Sequence[str]) -> None:
    from pathlib import Path

    from wm.config import load
    from wm.sync import sync
    from wm.worldmodels.pipeline import Config

    sync(Path(load(Config, words).runs))


def parity(words: Sequence[str]) -> None:
    from wm.worldmodels import pipeline

    pipeline.compare_simulators(*split_agent(words))


def split_agent(words: Sequence[str]) -> tuple[str | None, list[str]]:
    """The agent that the last run=ID or pretrained=GAME names, if any, and the other words.

    Raises:
        WMError: if nothing stands behind run= or pretrained=.
    """
    from wm.worldmodels.bundle import pretrained

    sources = {"run": str, "pretrained": pretrained}
    pairs = [word.partition("=") for word in words]
    for key, sign, value in pairs:
        if sign and key in sources and not value:  # an unset shell variable, for instance
            raise WMError(f"{key}= names no agent")
    chosen = [sources[key](value) for key, sign, value in pairs if sign and key in sources]
    others = [key + sign + value for key, sign, value in pairs if not sign or key not in sources]
    return chosen[-1] if chosen else None, others


def bundle(words: Sequence[str]) -> None:
    from wm.worldmodels.bundle import bundle

    bundle(words)


def ablate(words: Sequence[str]) -> None:
    from wm.ablate import ablate
    from wm.worldmodels import pipeline

    ablate(pipeline, words)


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

    chosen, others = split_agent(words)
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
    "choice": stage("choice"),
    "baseline": stage("baseline"),
    "evaluate": evaluate,
    "report": stage("report"),
    "bundle": bundle,
    "ablate": ablate,
    "parity": parity,
    "sync": sync,
    "config": config,
    "bench": bench,
}


def main() -> None:
    name, *words = sys.argv[1:] or ["help"]
    if name == "help" or {"-h", "--help"} & {name, *words}:
        print(USAGE)
        return
    if name not in COMMANDS:
        print(f"wm: there is no command '{name}'", file=sys.stderr)
        print(USAGE)
        sys.exit(2)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        COMMANDS[name](words)
    except WMError as error:
        print(f"wm: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        if error.errno not in OF_THE_DISK:
            raise
        print(f"wm: {error}; once that is mended, the same command goes on", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\nwm: interrupted; the same command goes on from here", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
