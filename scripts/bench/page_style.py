"""How a report's page looks: light and dark as the reader prefers, and as narrow as a phone."""

STYLE = """
:root {
  color-scheme: light dark;
  --page: #fbfbfa; --card: #ffffff; --ink: #1b1f24; --muted: #5d6673; --line: #d9dde2;
  --own: #0b6e75; --other: #a8642a; --good: #1a7340; --bad: #b3261e; --good-back: #e3f3e9; --bad-back: #fbe7e5;
  --c1: #0b6e75; --c2: #c77b30; --c3: #6a5fb0; --c4: #8a9a3b; --c5: #b0527c; --c6: #7a8592;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #14171a; --card: #1b1f23; --ink: #e6e9ec; --muted: #9aa4b0; --line: #343b43;
    --own: #4fc3c9; --other: #e0a067; --good: #6fcf97; --bad: #ff8a80; --good-back: #17301f; --bad-back: #3a1d1b;
    --c1: #4fc3c9; --c2: #e0a067; --c3: #a79df0; --c4: #b9c864; --c5: #e58bb3; --c6: #95a1ae;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
  -webkit-text-size-adjust: 100%;
}
main { max-width: 68rem; margin: 0 auto; padding: 2rem 1.25rem 4rem; }
h1 { font-size: clamp(1.45rem, 1.1rem + 1.6vw, 2.1rem); line-height: 1.22; margin: .3rem 0 .8rem; max-width: 30em;
  text-wrap: balance; letter-spacing: -.01em; }
h2 { font-size: 1.3rem; margin: 3rem 0 .6rem; padding-top: 1rem; border-top: 1px solid var(--line); }
h3 { font-size: 1.05rem; margin: 2rem 0 .15rem; }
p { margin: .35rem 0; max-width: 46em; overflow-wrap: anywhere; }
.kicker { color: var(--own); font-weight: 600; letter-spacing: .02em; }
.lead { font-size: 1.1rem; }
.muted, figcaption, caption { color: var(--muted); font-size: .875rem; }
.scroll { overflow-x: auto; margin: .6rem 0; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; min-width: 100%; }
th, td { padding: .38rem .8rem .38rem 0; text-align: left; vertical-align: middle;
  border-bottom: 1px solid var(--line); }
th { font-weight: 600; color: var(--muted); font-size: .8rem; white-space: nowrap; vertical-align: bottom; }
tbody th { color: var(--ink); font-size: .9rem; vertical-align: middle; }
td.n, th.n { text-align: right; } td.n { white-space: nowrap; } td.w { min-width: 7.5rem; }
thead th { min-width: 5rem; } th.n { white-space: normal; }
td small { color: var(--muted); font-size: .8rem; }
th small { color: var(--muted); font-weight: 400; display: block; white-space: normal; min-width: 9rem; }
tr.own th { color: var(--own); }
.faster { color: var(--good); } .slower { color: var(--bad); } .apart { color: var(--muted); font-style: italic; }
.faster b, .slower b { padding: .1rem .35rem; border-radius: .25rem; }
.faster b { background: var(--good-back); } .slower b { background: var(--bad-back); }
.strip { display: block; overflow: visible; }
.figures { columns: 2 20rem; column-gap: 1.25rem; margin: 1rem 0; }
figure { margin: 0 0 1.25rem; break-inside: avoid; padding: 1rem 1rem .8rem; background: var(--card);
  border: 1px solid var(--line); border-radius: .5rem; }
figure h3 { margin: 0 0 .3rem; font-size: 1rem; }
figure svg { width: 100%; height: auto; display: block; overflow: visible; font-family: inherit; }
figure svg * { stroke-linejoin: round; stroke-linecap: butt; }
pre, code { font: .85rem/1.5 ui-monospace, "SF Mono", Menlo, Consolas, monospace; }
pre { background: var(--card); border: 1px solid var(--line); border-radius: .4rem; padding: .7rem .9rem;
  white-space: pre-wrap; overflow-wrap: anywhere; margin: .5rem 0; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .25rem 1.2rem; margin: .6rem 0; font-size: .9rem; }
dt { color: var(--muted); } dd { margin: 0; overflow-wrap: anywhere; }
details { margin: .6rem 0; } summary { cursor: pointer; color: var(--own); }
@media (max-width: 32rem) {
  main { padding: 1.25rem .9rem 3rem; } dl { grid-template-columns: 1fr; gap: 0; } dd { margin-bottom: .5rem; }
  figure { padding: .8rem .6rem; }
}
@media print { body { background: none; } figure, tr { break-inside: avoid; } }
"""
