#include "data/runs/report_page.h"

namespace tailor {

// Two palettes, by the reader's setting; paper is always light. Each drawing is there twice, for
// wide and for narrow windows, so that its lettering is readable in both.
const char* const kReportStyle = R"css(
:root { color-scheme: light; --paper: #fff; --panel: #f6f7f9; --ink: #1b1f24; --quiet: #59636e; --line: #dde1e6;
  --strong: #8c959f; --blue: #2563a8; --orange: #bc4c00; --teal: #0d7a6c; --purple: #6d3fb0; --red: #b3261e;
  --good: #d9f0e0; --good-ink: #0b4f22; --bad: #fbe3e0; --bad-ink: #7d1a10; --neutral: #e7eaee;
  --start: #aab3bd; --load: #7aa7d6; --train: #2563a8; --stall: #d9822b; --evaluate: #7d55bd;
  --checkpoint: #2a9d8c; --idle: #d3d8de; --lost: #c23b32;
  --h0: #f3f4f6; --h1: #e6eef7; --h2: #d3e2f2; --h3: #b7d0ea; --h4: #93b8dd; --h5: #6b9bcd; --h6: #457db8;
  --h7: #265f9e; --h8: #12437b; --h9: #062650; }
@media screen and (prefers-color-scheme: dark) { :root { color-scheme: dark; --paper: #14171a; --panel: #1d2125;
  --ink: #e6e8ea; --quiet: #9ba5af; --line: #30363d; --strong: #6e7781; --blue: #79b1ec; --orange: #f0975a;
  --teal: #55c7b5; --purple: #b99cf0; --red: #f28b82; --good: #12391f; --good-ink: #9be3b3; --bad: #4a1a16;
  --bad-ink: #f7b4ad; --neutral: #2b3138; --start: #69737e; --load: #44709f; --train: #79b1ec; --stall: #f0a44f;
  --evaluate: #b99cf0; --checkpoint: #55c7b5; --idle: #3a424b; --lost: #ef7d74;
  --h0: #1d2125; --h1: #14263a; --h2: #17324f; --h3: #1b4168; --h4: #225585; --h5: #2f6da6; --h6: #4889c4;
  --h7: #70a8dc; --h8: #a3caee; --h9: #dcecfb; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2.5rem 1.5rem 4rem; max-width: 58rem; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", "DejaVu Sans", sans-serif;
  -webkit-text-size-adjust: 100%; }
h1 { font-size: 2rem; line-height: 1.2; letter-spacing: -.01em; margin: 0 0 .75rem; overflow-wrap: anywhere; }
h2 { font-size: 1.3rem; line-height: 1.3; margin: 0 0 .75rem; }
h3 { font-size: 1rem; margin: 0 0 .25rem; }
p { margin: .5rem 0; max-width: 44rem; }
section { margin-top: 2.75rem; }
.kicker { margin: 0 0 .25rem; color: var(--quiet); font-size: .85rem; letter-spacing: .04em; }
.lead { font-size: 1.1rem; margin: 0 0 1rem; }
.quiet, figcaption { color: var(--quiet); font-size: .9rem; }
.status { display: inline-block; font-size: .85rem; font-weight: 600; padding: .1rem .6rem; border-radius: 1rem;
  background: var(--neutral); vertical-align: .1em; margin-right: .35rem; }
.succeeded { background: var(--good); color: var(--good-ink); }
.failed, .lost { background: var(--bad); color: var(--bad-ink); }
.tiles { display: grid; grid-template-columns: repeat(3, 1fr); gap: .75rem; margin: 1.5rem 0; }
.tiles div { background: var(--panel); border-radius: .5rem; padding: .8rem 1rem; }
.tiles dt { color: var(--quiet); font-size: .85rem; }
.tiles dd { margin: 0; }
.tiles .value { font-size: 1.5rem; line-height: 1.3; font-weight: 600; font-variant-numeric: tabular-nums; }
.tiles .more { color: var(--quiet); font-size: .85rem; line-height: 1.35; }
.facts { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1.25rem; margin: 0; font-size: .9rem; }
.facts dt { color: var(--quiet); }
.facts dd { margin: 0; overflow-wrap: anywhere; }
figure { margin: 1.75rem 0 0; }
svg { display: block; width: 100%; height: auto; margin: .5rem 0; font-size: 12px; fill: var(--ink);
  font-variant-numeric: tabular-nums; overflow: visible; }
svg.narrow, .narrow-only { display: none; }
.q { fill: var(--quiet); }
.grid, .axis, .mark, .level { fill: none; stroke: var(--line); }
.axis { stroke: var(--strong); }
.mark { stroke: var(--strong); stroke-dasharray: 2 3; }
.level { stroke: var(--red); stroke-dasharray: 6 4; }
.line { fill: none; stroke-width: 1.8; stroke-linejoin: round; stroke-linecap: round; }
.faint { stroke-width: 1; stroke-opacity: .35; }
.dashed { stroke-dasharray: 2 5; }
.area { fill-opacity: .18; }
.heat path { stroke: var(--paper); stroke-width: 1; vector-effect: non-scaling-stroke; }
.heat.dense path { stroke: none; shape-rendering: crispEdges; }
.key { display: flex; flex-wrap: wrap; gap: .15rem 1.1rem; padding: 0; margin: .25rem 0; list-style: none;
  font-size: .85rem; color: var(--quiet); }
.key i { display: inline-block; width: 1.1rem; height: .25rem; border-radius: 1px; margin-right: .4rem;
  vertical-align: .25em; }
.key .pale { opacity: .4; }
.key .box { width: .85rem; height: .85rem; border-radius: 2px; vertical-align: -.1em; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .4rem 1rem .4rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
th { font-weight: 600; border-bottom-color: var(--strong); white-space: nowrap; }
td:last-child, th:last-child { padding-right: 0; }
.n { text-align: right; white-space: nowrap; }
.t { white-space: nowrap; }
tr.sum td { font-weight: 600; border-bottom: 0; border-top: 1px solid var(--strong); }
td .box { display: inline-block; width: .75rem; height: .75rem; border-radius: 2px; margin-right: .5rem; }
.bar { display: flex; height: 1.75rem; border-radius: .35rem; overflow: hidden; margin: 0 0 1rem;
  background: var(--neutral); }
.bar.small { height: .75rem; min-width: 7rem; border-radius: 2px; margin: .35rem 0 0; }
.bar i { display: block; }
.ratio { position: relative; height: .75rem; min-width: 8rem; margin-top: .35rem; background: var(--panel); }
.ratio i { position: absolute; left: 0; top: 0; bottom: 0; background: var(--load); border-radius: 0 2px 2px 0; }
.ratio b { position: absolute; left: 50%; top: -.2rem; bottom: -.2rem; border-left: 1.5px solid var(--ink); }
code, pre { font-family: ui-monospace, SFMono-Regular, Menlo, "DejaVu Sans Mono", monospace; font-size: .85em; }
code { overflow-wrap: anywhere; }
pre { background: var(--panel); border-radius: .5rem; padding: 1rem 1.25rem; margin: 0; line-height: 1.5;
  white-space: pre-wrap; overflow-wrap: anywhere; columns: 22rem; column-gap: 2rem; }
footer { margin-top: 3rem; padding-top: 1rem; border-top: 1px solid var(--line); color: var(--quiet);
  font-size: .85rem; }
i, .bar, .status, .tiles div, .ratio, pre, svg { -webkit-print-color-adjust: exact; print-color-adjust: exact; }
@media (max-width: 40rem) { body { padding: 1.5rem 1rem 3rem; } h1 { font-size: 1.6rem; } .lead { font-size: 1rem; }
  .tiles { grid-template-columns: 1fr 1fr; gap: .5rem; } .tiles div { padding: .6rem .75rem; }
  .tiles .value { font-size: 1.25rem; } svg.wide, .wide-only { display: none; } svg.narrow, .narrow-only { display: block; }
  .facts { grid-template-columns: 1fr; gap: 0; } .facts dd { margin-bottom: .35rem; } }
@media print { @page { margin: 16mm; } body { padding: 0; max-width: none; font-size: 10pt; }
  svg.wide { display: block; } svg.narrow, .narrow-only { display: none; } p.wide-only { display: block; }
  td.wide-only, th.wide-only { display: table-cell; } section { margin-top: 1.5rem; }
  figure, .tiles, tr, .bar { break-inside: avoid; } h2, h3 { break-after: avoid; } .scroll { overflow: visible; }
  pre { font-size: 7.5pt; columns: 2; } }
)css";

}  // namespace tailor
