"""What a person sees of a run: on a terminal a panel that is drawn again and again, else a plain
line every few seconds.
"""

import time
from collections import deque
from typing import TYPE_CHECKING

from saezoo_train.watch import Row, Watch

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

BARS = "▁▂▃▄▅▆▇█"
CURVE = 40
"""Points of the small curves."""
SECONDS = 5.0
"""Between plain lines."""
SPEED = 8
"""Times of progress that a speed is over."""


class Clock:
    """How fast a phase goes, and how long it will still take. What comes before the first progress
    is not counted: the first call of a model takes many times as long as the next.
    """

    def __init__(self, total: int | None, done: int) -> None:
        self.total, self.done = total, done
        self.marks: deque[tuple[float, int]] = deque(maxlen=SPEED)

    def move(self, done: int) -> None:
        """So much is done now."""
        self.done = done
        if not self.marks or time.monotonic() - self.marks[-1][0] >= 1:
            self.marks.append((time.monotonic(), done))

    @property
    def speed(self) -> float:
        """A second, lately; 0 while nobody can say."""
        if len(self.marks) < 2:
            return 0.0
        when, done = self.marks[0]
        return (self.done - done) / max(time.monotonic() - when, 1e-3)

    @property
    def left(self) -> float | None:
        """Seconds until the end; None while nobody can say."""
        if self.total is None or self.speed <= 0:
            return None
        return (self.total - self.done) / self.speed


class Lines(Watch):
    """A plain line every few seconds, for logs and pipes."""

    def __init__(self, console: "Console") -> None:
        self.console = console
        self.clock, self.name, self.unit, self.spoke = Clock(None, 0), "", "tokens", 0.0

    def note(self, line: str) -> None:
        self.console.print(line, markup=False)

    def phase(self, name: str, total: int | None, done: int = 0, unit: str = "tokens") -> None:
        self.name, self.unit, self.clock = name, unit, Clock(total, done)
        self.spoke = time.monotonic()
        self.console.print(f"{name} …" if total is None else f"{name}: {total:,} {unit}")

    def progress(self, done: int) -> None:
        self.clock.move(done)
        if self.name != "training" and time.monotonic() - self.spoke >= SECONDS:
            self.spoke = time.monotonic()
            of = f" of {self.clock.total:,}" if self.clock.total else ""
            self.console.print(f"{self.name}: {done:,}{of} {self.unit}{ends_in(self.clock)}")

    def row(self, row: Row) -> None:
        if time.monotonic() - self.spoke >= SECONDS or self.clock.done == self.clock.total:
            self.spoke = time.monotonic()
            self.console.print(
                f"step {row['step']:>7,}  FVU {row['fvu']:.4f}  L0 {row['l0']:.1f}  "
                f"dead {row['dead']:.1%}  lr {row['lr']:.1e}  "
                f"{row['tokens_per_second']:,.0f} tokens/s{ends_in(self.clock)}"
            )


class Panel(Watch):
    """A panel on a terminal: what is done, how far it is, and how the SAE gets on."""

    def __init__(self, console: "Console", title: str) -> None:
        from rich.live import Live

        self.console, self.title = console, title
        self.clock, self.name, self.unit = Clock(None, 0), "", "tokens"
        self.rows: list[Row] = []
        self.began = time.monotonic()
        self.live = Live(
            console=console, get_renderable=self.draw, refresh_per_second=4, transient=False
        )
        self.live.start()

    def note(self, line: str) -> None:
        self.console.print(line, style="dim", markup=False)

    def phase(self, name: str, total: int | None, done: int = 0, unit: str = "tokens") -> None:
        self.name, self.unit, self.clock = name, unit, Clock(total, done)

    def progress(self, done: int) -> None:
        self.clock.move(done)

    def row(self, row: Row) -> None:
        self.rows.append(row)

    def close(self) -> None:
        self.live.stop()

    def draw(self) -> "RenderableType":
        """The panel as it is now."""
        from rich.console import Group
        from rich.panel import Panel as Box

        parts: list[RenderableType] = [self._bar()]
        if self.rows:
            parts += ["", self._numbers()]
        return Box(
            Group(*parts),
            title=f"[bold]{self.title}[/bold]",
            title_align="left",
            border_style="dim",
            padding=(1, 2),
            width=min(self.console.width, 88),
        )

    def _bar(self) -> "RenderableType":
        from rich.progress_bar import ProgressBar
        from rich.table import Table

        clock = self.clock
        line = Table.grid(padding=(0, 2), expand=True)
        line.add_column(no_wrap=True)
        line.add_column(ratio=1)
        line.add_column(justify="right", no_wrap=True)
        if clock.total is None:
            line.add_row(f"{self.name} …", "", duration(time.monotonic() - self.began))
            return line
        share = min(clock.done / max(clock.total, 1), 1.0)
        line.add_row(
            self.name,
            ProgressBar(total=1.0, completed=share, complete_style="cyan", finished_style="cyan"),
            f"{share:4.0%}",
        )
        speed = f"{clock.speed:,.{0 if clock.speed >= 10 else 1}f}"
        rate = f"{speed} {self.unit}/s" if clock.speed else ""
        left = f"{duration(clock.left)} left" if clock.left is not None else ""
        line.add_row(
            "",
            f"[dim]{clock.done:,} of {clock.total:,} {self.unit}   {rate}[/dim]",
            f"[dim]{left}[/dim]",
        )
        return line

    def _numbers(self) -> "RenderableType":
        from rich.table import Table

        last = self.rows[-1]
        table = Table.grid(padding=(0, 2))
        for justify in ("left", "right", "left", "left"):
            table.add_column(justify=justify, no_wrap=True)
        shown = (
            ("FVU", "fvu", f"{last['fvu']:.4f}", "unexplained variance of the batches"),
            ("L0", "l0", f"{last['l0']:.1f}", "features on per token"),
            ("dead", "dead", f"{last['dead']:.1%}", "features that no longer fire"),
            ("lr", "lr", f"{last['lr']:.1e}", "learning rate"),
        )
        for label, key, value, words in shown:
            curve = sparkline([row[key] for row in self.rows])
            table.add_row(
                label, f"[bold]{value}[/bold]", f"[cyan]{curve}[/cyan]", f"[dim]{words}[/dim]"
            )
        return table


def make_watch(title: str) -> Watch:
    """A panel where stderr is a terminal, lines where it is not."""
    from rich.console import Console

    console = Console(stderr=True, highlight=False)
    if console.is_terminal and not console.is_dumb_terminal:
        return Panel(console, title)
    return Lines(Console(stderr=True, highlight=False, width=120, soft_wrap=True))


def sparkline(values: list[float], width: int = CURVE) -> str:
    """A curve in one line of text, its lowest value at the bottom; means where there are more
    values than room. What stays within a thousandth is flat.
    """
    if not values:
        return ""
    parts = min(width, len(values))
    edges = [len(values) * part // parts for part in range(parts + 1)]
    means = [
        sum(values[start:end]) / (end - start) for start, end in zip(edges, edges[1:], strict=False)
    ]
    low, high = min(means), max(means)
    spread, flat = high - low, max(1e-3 * max(abs(low), abs(high)), 1e-12)
    return "".join(
        BARS[round((value - low) / spread * (len(BARS) - 1))] if spread > flat else BARS[0]
        for value in means
    )


def duration(seconds: float) -> str:
    """1:02 or 3:04:05."""
    minutes, rest = divmod(max(round(seconds), 0), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def ends_in(clock: Clock) -> str:
    """`, 1:02 left`, where that is known."""
    return f", {duration(clock.left)} left" if clock.left is not None else ""
