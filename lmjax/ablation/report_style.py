"""How the page of an ablation looks: light, dark, on a phone, in print.

The classes that pictures use are listed in `svg.py`, with their colours.
"""

from __future__ import annotations

from collections.abc import Sequence

from lmjax.ablation.svg import PALETTE


def style() -> str:
    """The whole style sheet."""
    light, dark = (_colors(PALETTE[name]) for name in ("light", "dark"))
    light += "--ink:#1c1f23;--muted:#5c646d;--ground:#fff;--panel:#f6f7f9;--rule:#d9dde1;"
    dark += "--ink:#e8eaed;--muted:#a0a8b1;--ground:#15181b;--panel:#1f2429;--rule:#3a4149;"
    series = "".join(
        f".stroke{i}{{stroke:var(--c{i})}}.fill{i}{{fill:var(--c{i});background:var(--c{i})}}"
        for i in range(len(PALETTE["light"]))
    )
    return (
        f":root{{{light}}}@media (prefers-color-scheme:dark){{:root{{{dark}}}}}"
        f"{_RULES}{series}@media print{{:root{{{light}}}{_PRINT}}}"
    )


def _colors(palette: Sequence[str]) -> str:
    return "".join(f"--c{i}:{color};" for i, color in enumerate(palette))


_RULES = """
*{box-sizing:border-box}
body{margin:0;background:var(--ground);color:var(--ink);font:16px/1.5 system-ui,sans-serif}
main{max-width:66rem;margin:0 auto;padding:1.5rem 1rem 4rem}
h1{font-size:1.6rem;line-height:1.25;margin:.1rem 0 1rem;text-wrap:balance}
h2{font-size:1.15rem;margin:2.5rem 0 .75rem;padding-top:.6rem;border-top:1px solid var(--rule)}
h3{font-size:1rem;margin:1.5rem 0 .5rem}
.kind,.note,small{color:var(--muted)}
.kind{margin:0}
.note{font-size:.85rem;max-width:46rem;margin:.5rem 0 1rem}
.warning{border-left:4px solid var(--c2);padding-left:.6rem}
.verdicts{list-style:none;margin:0;padding:0;display:grid;gap:.5rem;
grid-template-columns:repeat(auto-fill,minmax(min(100%,20rem),1fr))}
.verdicts li{display:flex;gap:.7rem;background:var(--panel);border-radius:.4rem;padding:.6rem .8rem;
border-left:4px solid var(--rule)}
.verdicts p{margin:.1rem 0 0;overflow-wrap:anywhere}
.verdicts .mark{font-size:1.1rem;width:1.2rem;text-align:center;flex:none}
li.worse{border-color:var(--c2)}li.failed{border-color:var(--c2);border-left-style:double}
li.better{border-color:var(--c1)}li.equivalent{border-color:var(--c3)}
.figures{display:grid;gap:1.5rem;grid-template-columns:repeat(auto-fit,minmax(min(100%,22rem),1fr))}
figure{margin:0;max-width:34rem}
figure.single{max-width:40rem}
svg{display:block;width:100%;height:auto;overflow:visible}
text{fill:var(--ink)}text.muted{fill:var(--muted)}text.name{font-weight:600}
.grid,.axis,.lead{stroke:var(--rule);fill:none}.axis{stroke:var(--muted)}
.zero{stroke:var(--muted)}rect.margin{fill:var(--muted);opacity:.15}
.line{fill:none;stroke-width:1.8;stroke-linejoin:round}.band{opacity:.2}
.dashed{stroke-dasharray:5 3}.cross{fill:none;stroke-width:2.5}
.mean{stroke:var(--ground);stroke-width:1}.seed{fill:var(--muted)}
.scroll{overflow-x:auto;margin:.75rem 0}
table{border-collapse:collapse;font-size:.85rem;font-variant-numeric:tabular-nums}
th,td{text-align:left;vertical-align:top;padding:.3rem .9rem .3rem 0;
border-bottom:1px solid var(--rule)}
th{color:var(--muted);font-weight:500}
.numeric td,.numeric th{white-space:nowrap}
code{font-size:.92em;overflow-wrap:anywhere}
a{color:var(--c1)}td a{margin-right:.5rem}
.swatch{display:inline-block;width:.7em;height:.7em;border-radius:2px;margin-right:.45em}
summary{cursor:pointer}
.columns{columns:19rem;list-style:none;padding:0;margin:.75rem 0;font-size:.85rem}
.columns li{break-inside:avoid;padding:.15rem 0;color:var(--muted)}
.columns code{color:var(--ink);margin-left:.4em}
"""

_PRINT = """
@page{margin:14mm}
body{font-size:10.5pt}main{max-width:none;padding:0}
.scroll{overflow:visible}table{font-size:8pt}.columns{columns:3;font-size:8pt}th,td{padding-right:.5rem}
.numeric td,.numeric th{white-space:normal}
.figures{grid-template-columns:1fr 1fr}
figure,tr,.verdicts li{break-inside:avoid}h2,h3{break-after:avoid}
details::details-content{content-visibility:visible;display:block}
*{print-color-adjust:exact;-webkit-print-color-adjust:exact}
"""
