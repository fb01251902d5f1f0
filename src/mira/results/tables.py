"""The table of a run's result, for a terminal."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.measure import Measurement
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

Result = dict[str, Any]

_ENDLESS = 10_000  # columns


@dataclass(frozen=True)
class Fitting:
    """The first of ``grids`` that fits the width of the console. If none fits: the rows of the first grid as blocks of lines, the
    first cell above the others, each with its header. ``bare``: headers that are left out in blocks."""

    grids: Sequence[Table]
    bare: Collection[str] = ()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for grid in self.grids:
            if Measurement.get(console, options.update(max_width=_ENDLESS), grid).maximum <= options.max_width:
                yield grid
                return
        grid = self.grids[0]
        yield Text(f"{grid.title or ''}", overflow="fold")
        heads = [str(column.header) for column in grid.columns]
        for name, *cells in zip(*(column.cells for column in grid.columns), strict=True):
            yield Text(str(name), overflow="fold")
            said = zip(heads[1:], map(str, cells), strict=True)
            items = [cell if head in self.bare else f"{head} {cell}" for head, cell in said if cell]
            for line in _filled(items, options.max_width - 2):
                yield Padding(Text(line, overflow="fold"), (0, 0, 0, 2))


def _filled(items: Sequence[str], width: int) -> list[str]:
    """``items`` in lines of at most ``width`` columns, as many per line as fit."""
    lines: list[str] = []
    for item in items:
        longer = f"{lines[-1]}, {item}" if lines else item
        if lines and cell_len(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(item)
    return lines


def table(result: Result) -> Group:
    """One line for each client with its values before and after, the mean, and the cost of the run."""
    grid = Table(box=box.SIMPLE_HEAD, title=f"{result['method']}, {result['rounds']} rounds", title_justify="left")
    grid.add_column("task", overflow="fold")
    grid.add_column("examples", justify="right")
    grid.add_column("test loss", justify="right", no_wrap=True)
    answered = result["exact_match"] is not None
    if answered:
        grid.add_column("exact match", justify="right", no_wrap=True)
        grid.add_column("ROUGE-L", justify="right", no_wrap=True)
    clients, told = result["clients"], not is_untold(result.get("privacy", {}))
    for c in clients:
        grid.add_row(Text(c["name"]), *_line(NOT_TOLD if c["examples"] is None else str(c["examples"]), c, answered))
    if told:
        mean = {key: _mean(clients, key) for key in _SHOWN}
        grid.add_section()
        grid.add_row("mean", *_line("", mean, answered), style="bold")
    best, model = result["best"], result["model"]
    lines = [
        f"global loss {number(result['global_loss'])} (adapters on other clients' data)"
        if result["global_loss"] is not None
        else "",
        f"best round {best['round']} by validation: test loss {number(best['local_loss'])}"
        + (f", exact match {number(best['exact_match'], 2)}" if best["exact_match"] is not None else "")
        if told
        else "",
        ", ".join(
            f"{name} {number(m['start'])} → {number(m['last'])}" for name, m in result.get("metrics", {}).items()
        ),
        f"sent {data_size(result['bytes_up'])} up, {data_size(result['bytes_down'])} down"
        + (f"; clients lost from a round: {result['lost']}" if result["lost"] else ""),
        privacy(result["privacy"]) if "privacy" in result else "",
        f"ended early: {result['stopped']}" if "stopped" in result else "",
        f"{result['seconds']:.0f} s,"
        + (f" {result['tokens_per_second']:.0f} training tokens/s," if told else "")
        + f" peak memory {data_size(result['peak_memory_bytes'])}",
        f"model {model['name']} ({model['source']}, sha256 {model['sha256'][:12]})"
        + (f", {result['template']} prompts" if result.get("template") else ""),
        f"run folder {_relative(result['run'])}",
    ]
    return Group(Fitting([grid]), *[Text(line, overflow="fold") for line in lines if line])


NOT_TOLD = "not told"
_SHOWN = ("loss_start", "loss", "exact_match_start", "exact_match", "rouge_l_start", "rouge_l")


def number(value: float | None, digits: int = 3) -> str:
    """A number for people; "–" for None (not measured, or not finite)."""
    return "–" if value is None else f"{value:.{digits}f}"


def probability(p: float) -> str:
    return "<0.001" if p < 0.001 else f"{p:.3f}"


def _line(examples: str, values: dict[str, Any], answered: bool) -> list[str]:
    if examples == NOT_TOLD:
        return [examples, NOT_TOLD]
    shown = [("loss_start", "loss", 3)]
    if answered:
        shown += [("exact_match_start", "exact_match", 2), ("rouge_l_start", "rouge_l", 2)]
    return [examples, *(f"{number(values[a], digits)} → {number(values[b], digits)}" for a, b, digits in shown)]


def _mean(clients: Sequence[dict[str, Any]], key: str) -> float | None:
    values = [client[key] for client in clients]
    return None if None in values else sum(values) / len(values)


_REPORTED = ", as sites last reported"  # a lost reply or round counts at the site before the server hears of it


def is_untold(spent: dict[str, dict[str, Any]]) -> bool:
    """Tell whether the clients of a record's ``privacy`` told no losses, metrics and counts."""
    return any(s.get("metrics") == "none" for s in spent.values())


def privacy(spent: dict[str, dict[str, Any]]) -> str:
    """One sentence for people, from a record's ``privacy``: (ε, δ) of each client, as accounted by its site or by the run."""
    rest = "losses, metrics and counts are not " + ("told" if is_untold(spent) else "covered")
    if any(s.get("metrics") == "noised" for s in spent.values()):
        rest = (
            "losses have noise, which is counted; other metrics are not told, the numbers of examples are not covered"
        )
    if any("steps" in s for s in spent.values()):
        each = ", ".join(
            f"{name} ({'at most ' * ('at_most' in s)}{s['epsilon']:.3g}, {s['delta']:g}) of {s['steps']} steps"
            for name, s in spent.items()
        )
        source = _REPORTED if any(s.get("reported") for s in spent.values()) else ""
        found = f"differential privacy (ε, δ) of each training example{source}: {each}; {rest}"
        simulated = any(s.get("simulation") for s in spent.values())
        return f"a simulation, which protects nobody: {found}" if simulated else found
    each = ", ".join(f"{name} ({s['epsilon']:.3g}, {s['delta']:g}) of {s['releases']}" for name, s in spent.items())
    return f"differential privacy (ε, δ) of released adapters{_REPORTED}: {each}; {rest}"


def data_size(count: float) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"


def _relative(path: str) -> str:
    try:
        return str(Path(path).relative_to(Path.cwd()))
    except ValueError:
        return path
