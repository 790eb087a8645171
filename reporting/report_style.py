"""The page's look: on a screen and a phone, in light and dark, in print."""

STYLE = """
:root {
  color-scheme: light dark;
  --ink: #1b2733; --muted: #5b6b7a; --line: #d9e0e6; --page: #f6f8fa; --card: #ffffff;
  --one: #1f6fb2; --two: #d9771c; --bad: #b3382c;
}
@media (prefers-color-scheme: dark) {
  :root {
    --ink: #e3e9ef; --muted: #9aa8b5; --line: #36414c; --page: #12181e; --card: #1a222a;
    --one: #6cb2eb; --two: #f0a35c; --bad: #f08a7d;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif;
}
main { max-width: 1120px; margin: 0 auto; padding: 32px 20px 64px; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 4px; }
h2 { font-size: 1.2rem; margin: 40px 0 12px; }
p { margin: 8px 0; }
.sub, .note, figcaption { color: var(--muted); font-size: .875rem; }

.remark {
  border-left: 3px solid var(--bad); padding: 8px 12px; background: var(--card);
  overflow-wrap: anywhere;
}
.tiles {
  display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px;
  margin: 24px 0 0; padding: 0;
}
.tile, figure, .card {
  background: var(--card); border: 1px solid var(--line); border-radius: 8px; margin: 0;
}
.tile { padding: 12px 16px; }
.tile dt { color: var(--muted); font-size: .8rem; }
.tile dd { margin: 0; font-size: 1.4rem; font-weight: 600; line-height: 1.35;
  font-variant-numeric: tabular-nums; white-space: nowrap; }
.tile .more { font-size: .8rem; font-weight: 400; color: var(--muted); white-space: normal; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 420px), 1fr));
  gap: 12px; }
figure { padding: 12px 14px; min-width: 0; break-inside: avoid; }
figure h3 { margin: 0 0 6px; font-size: 1rem; }
figure svg { display: block; width: 100%; height: auto; color: var(--muted); }
svg * { stroke-linejoin: round; stroke-linecap: butt; }
figcaption { margin-top: 6px; }
.columns { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 420px), 1fr));
  gap: 12px; align-items: start; }
.card { padding: 4px 16px; min-width: 0; break-inside: avoid; }
section > * + .card, section > * + .columns, section > * + .charts { margin-top: 12px; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; }
caption { text-align: left; font-weight: 600; padding: 10px 0 6px; }
th, td { text-align: left; vertical-align: top; padding: 5px 12px 5px 0;
  border-top: 1px solid var(--line); overflow-wrap: anywhere; }
td:first-child, thead th { overflow-wrap: normal; }
thead th { border-top: 0; color: var(--muted); font-weight: 500; font-size: .8rem; }
tbody th { font-weight: 400; color: var(--muted); }
.number { text-align: right; font-variant-numeric: tabular-nums; }
td:last-child, th:last-child { padding-right: 0; }
.facts th { width: 42%; }
code { font: .85em ui-monospace, SFMono-Regular, Menlo, Consolas, monospace;
  overflow-wrap: anywhere; }
.share { width: 26%; }
.bar { display: block; height: 8px; margin-top: 7px; border-radius: 2px; background: var(--one); }
details { margin-top: 12px; }
summary { cursor: pointer; padding: 10px 0; font-weight: 600; }
footer { margin-top: 48px; border-top: 1px solid var(--line); padding-top: 12px; }
@media (max-width: 520px) {
  main { padding: 20px 12px 40px; }
  h1 { font-size: 1.4rem; }
  .tiles { grid-template-columns: 1fr 1fr; gap: 8px; }
  .tile { padding: 10px 12px; }
  .tile dd { font-size: 1.25rem; }
  .card { padding: 2px 12px; }
  figure { padding: 10px 8px; }
  table { font-size: .8rem; }
  th, td { padding-right: 8px; }
  .share { display: none; }
}
@page { margin: 14mm; }
@media print {
  :root {
    --ink: #000000; --muted: #444444; --line: #bbbbbb; --page: #ffffff; --card: #ffffff;
    --one: #1f6fb2; --two: #d9771c; --bad: #b3382c;
  }
  body { font-size: 10pt; }
  main { max-width: none; padding: 0; }
  h2 { break-after: avoid; margin-top: 20px; }
  .charts, .columns { grid-template-columns: 1fr 1fr; }
  .tiles { grid-template-columns: repeat(3, 1fr); }
  .bar { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
  tr, .tile { break-inside: avoid; }
}
"""
