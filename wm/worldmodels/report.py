"""One self-contained HTML page per pipeline: scores, costs and pictures, embedded."""

import base64
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment

from wm.evaluate import EPISODES, read_returns
from wm.files import write_atomically
from wm.ranks import leads
from wm.stages import read_manifest
from wm.tracking import StageRun
from wm.training import TrainerConfig
from wm.worlds import ORDINARY, World

# Mean and standard deviation over 100 episodes; Ha & Schmidhuber 2018 (arXiv 1809.01999), tables 1
# and 2, and Olesen et al. 2020: who, where the controller's fitness came from, and the score.
PUBLISHED = {
    "carracing": [
        ("DQN", "real game", "343 ± 18"),
        ("A3C, continuous", "real game", "591 ± 45"),
        ("A3C, discrete", "real game", "652 ± 10"),
        ("best leaderboard entry of 2018", "real game", "838 ± 11"),
        ("World Models, V only", "real game", "632 ± 251"),
        ("World Models, V only, hidden layer", "real game", "788 ± 141"),
        ("World Models, V and M", "real game", "906 ± 21"),
        ("Olesen et al., random data", "dream", "356 ± 177"),
        ("Olesen et al., five rounds", "dream", "708 ± 195"),
    ],
    "takecover": [
        ("random policy", "-", "210 ± 108"),
        ("best leaderboard entry of 2018", "real game", "820 ± 58"),
        ("World Models, τ = 0.10", "dream", "193 ± 58"),
        ("World Models, τ = 0.50", "dream", "196 ± 50"),
        ("World Models, τ = 1.00", "dream", "868 ± 511"),
        ("World Models, τ = 1.15", "dream", "1092 ± 556"),
        ("World Models, τ = 1.30", "dream", "753 ± 139"),
    ],
}

PICTURES = {
    "reconstructions.png": "What V keeps of a frame",
    "traversals.png": "What the most active latents mean",
    "futures.png": "Where ways part: the game, and five dreams with the same actions",
    "prediction_error.png": "How long M can be left alone",
    "evolution.png": "How C learnt: returns in its dreams, and in the real game",
    "filmstrip.png": "A held-out episode: real, seen, and dreamt from the same frame and actions",
}
VIDEO = "episode.mp4"
READS = (*PICTURES, VIDEO, EPISODES)  # of the stages' files, beside their manifests

PAGE = Environment(autoescape=True).from_string(
    """<!doctype html><html lang="en"><meta charset="utf-8"><title>{{ title }}</title>
<style>
 body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
 table { border-collapse: collapse; margin: 1rem 0 }
 td, th { padding: .2rem .8rem; text-align: left }
 tr { border-bottom: 1px solid #ddd } .ours { font-weight: bold } img, video { max-width: 100% }
 pre { background: #f5f5f5; padding: 1rem; overflow: auto; font-size: 12px }
</style>
<h1>{{ title }}</h1>
<p>{{ headline }}</p>
<h2>Scores</h2>
<table><tr><th>who</th><th>controller trained in</th><th>return, mean ± std</th>
<th>95 % interval of the mean</th><th>episodes</th></tr>
{% for row in scores %}<tr class="{{ row.kind }}"><td>{{ row.who }}</td><td>{{ row.where }}</td>
<td>{{ row.score }}</td><td>{{ row.interval }}</td><td>{{ row.episodes }}</td></tr>{% endfor %}
</table>
<h2>Cost</h2>
<p>The overhead is the share of a stage's time that was not spent with models and games: reading
data, validation of V and M, MLflow, checkpoints and pictures.</p>
<table><tr><th>stage</th><th>wall time</th><th>overhead</th></tr>
{% for row in times %}<tr class="{{ row.kind }}"><td>{{ row.stage }}</td>
<td>{{ "%.1f"|format(row.seconds / 60) }} min</td><td>{{ "%.1f"|format(100 * row.overhead) }} %</td>
</tr>{% endfor %}</table>
{% for picture in pictures %}<h3>{{ picture.title }} <small>({{ picture.stage }})</small></h3>
<img alt="{{ picture.title }}" src="data:image/png;base64,{{ picture.data }}">{% endfor %}
{% if video %}<h3>A median episode: the game, and what V sees</h3>
<video controls src="data:video/mp4;base64,{{ video }}"></video>{% endif %}
<h2>Configuration</h2><pre>{{ config }}</pre>
<h2>Versions</h2><pre>{{ versions }}</pre>
</html>"""
)


def write_report(
    folder: Path,
    inputs: dict[str, Path],
    run: StageRun,
    trainer: TrainerConfig,
    *,
    config: dict[str, Any],
) -> dict[str, float]:
    """Gather what the stages left into report.html."""
    if not leads():
        return {}
    records = {label: read_manifest(path) for label, path in inputs.items()}
    cost = costs(list(records.values()))
    page = PAGE.render(
        title=f"World Models: {config['env']['name']}, scale {config['scale']}",
        headline=f"Seed {config['seed']}, {config['rounds']} round(s). "
        f"Scores are returns in the official game{_elsewhere(config)} on held-out seeds.",
        scores=[*published(config), *measured(config, records, inputs)],
        times=times(records, cost),
        pictures=list(_pictures(inputs)),
        video=_embed(inputs["evaluate"] / VIDEO),
        config=json.dumps(config, indent=1),
        versions=json.dumps(records["evaluate"]["versions"], indent=1),
    )
    write_atomically(folder / "report.html", page)
    run.log_file(folder / "report.html")
    return cost


def _elsewhere(config: dict[str, Any]) -> str:
    world = World(**config["evaluate"].get("world", {}))
    return "" if world == ORDINARY else f" with another world ({world}; not that of training)"


def published(config: dict[str, Any]) -> list[dict[str, Any]]:
    rows = PUBLISHED.get(config["env"]["name"], [])
    return [
        {"who": who, "where": where, "score": score, "interval": "", "episodes": 100}
        for who, where, score in rows
    ]


def measured(
    config: dict[str, Any], records: dict[str, Any], inputs: dict[str, Path]
) -> list[dict[str, Any]]:
    where = {"dream": "dream", "real": "real game"}[config["controller"]["fitness"]]
    if config["tuning"]["generations"]:
        where += ", then real game"
    elif where == "dream" and config["controller"]["keep"] == "best":
        where = "dream; chosen on validation seeds of the real game"
    rows = []
    for who, place, label, prefix in (
        ("random policy, ours", "-", "baseline", "random"),
        ("this agent", where, "evaluate", "eval"),
    ):
        facts = records[label]["facts"]
        low, high = facts[f"{prefix}/ci_low"], facts[f"{prefix}/ci_high"]
        rows.append(
            {
                "kind": "ours",
                "who": who,
                "where": place,
                "score": f"{facts[f'{prefix}/mean']:.1f} ± {facts[f'{prefix}/std']:.1f}",
                "interval": f"[{low:.1f}, {high:.1f}]",
                "episodes": len(read_returns(inputs[label] / EPISODES)),
            }
        )
    return rows


def times(records: dict[str, Any], cost: dict[str, float]) -> list[dict[str, Any]]:
    rows = [
        {
            "stage": label,
            "seconds": record["seconds"],
            "overhead": 1 - record["busy_seconds"] / record["seconds"],
        }
        for label, record in records.items()
    ]
    all_stages = f"all, with {cost['cost/real_steps']:,.0f} real steps"
    total = {"seconds": cost["cost/seconds"], "overhead": cost["cost/overhead"]}
    return [*rows, {"kind": "ours", "stage": all_stages, **total}]


def costs(records: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Wall time of all stages, the share of it that neither models nor games took, and real steps:
    collected, for validation, for fitness or practice there.
    """
    facts = [record["facts"] for record in records]
    steps = sum(f.get("collect/steps", 0) + f.get("controller/played_steps", 0) for f in facts)
    seconds, busy = (sum(r[name] for r in records) for name in ("seconds", "busy_seconds"))
    return {
        "cost/seconds": seconds,
        "cost/overhead": 1 - busy / seconds,
        "cost/real_steps": steps,
    }


def _pictures(inputs: dict[str, Path]):
    for name, title in PICTURES.items():
        for label, folder in inputs.items():
            if data := _embed(folder / name):
                yield {"title": title, "stage": label, "data": data}


def _embed(path: Path) -> str:
    return base64.b64encode(path.read_bytes()).decode() if path.is_file() else ""
