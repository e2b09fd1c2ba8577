"""The words and the look of a sweep's result page; `sweep_page` fills it."""

# Colours from none held to all held, and from the lowest value to the highest; light, then dark.
SCALES = {"part": ("#f8cfb4", "#b5daf0", "#6b3413", "#12496b"),
          "depth": ("#f4f8fb", "#56b4e9", "#1c232c", "#0b5f93")}  # fmt: skip


def _scale(name: str, low: str, high: str) -> str:
    """Eleven rules, for `data-part` or `data-depth` 0 to 10; a plain colour each, for old tools."""
    ends = [[int(colour[i : i + 2], 16) for i in (1, 3, 5)] for colour in (low, high)]
    where = ".map td" if name == "part" else ":root:has(#by-value:checked) .maps td[data-part]"
    rules = []
    for level in range(11):
        mixed = (round(a + (b - a) * level / 10) for a, b in zip(*ends, strict=True))
        rules.append(f'{where}[data-{name}="{level}"]{{background:#{bytes(mixed).hex()}}}')
    return "\n".join(rules)


_LOOK = """
:root { --ink: #1d232b; --soft-ink: #55606e; --paper: #fff; --surface: #f5f6f8; --line: #d8dde4;
  --link: #0b5a8a; --held: #b5daf0; --failed: #f8cfb4; --low: #f4f8fb; --high: #56b4e9;
  color-scheme: light dark; }
@media (prefers-color-scheme: dark) { :root { --ink: #e3e8ee; --soft-ink: #a9b5c3;
  --paper: #14181e; --surface: #1f252e; --line: #36404d; --link: #7cc4ee; --held: #12496b;
  --failed: #6b3413; --low: #1c232c; --high: #0b5f93; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 1rem/1.5 "Source Sans 3", system-ui, sans-serif; }
main { max-width: 76rem; margin: 0 auto; padding: 1.5rem 1.2rem 4rem; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .3rem; }
h2 { font-size: 1.35rem; margin: 2.6rem 0 .6rem; padding-top: .8rem;
  border-top: 1px solid var(--line); }
h3 { font-size: 1.02rem; margin: 1.9rem 0 .3rem; max-width: 60rem; font-weight: 600; }
h4 { font-size: .95rem; margin: .8rem 0 .2rem; }
p { margin: .3rem 0 .7rem; max-width: 46rem; }
.soft, h3 code, caption { color: var(--soft-ink); }
a { color: var(--link); }
:focus-visible { outline: 3px solid #d55e00; outline-offset: 2px; }
code { font: .88em ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
.scroll { overflow-x: auto; margin: .4rem 0 1rem; }
table { border-collapse: separate; border-spacing: 2px; font-variant-numeric: tabular-nums; }
th { text-align: left; font-weight: 600; padding: .25rem .5rem; vertical-align: bottom; }
td { padding: .3rem .5rem; vertical-align: top; }
.map th, .map td { text-align: center; }
.map tbody th { text-align: right; vertical-align: middle; font-weight: 400; }
.map tbody th.claim { text-align: left; min-width: 15rem; max-width: 30rem; }
.map td { min-width: 4.2rem; max-width: 9rem; border-radius: 4px; background: var(--surface); }
:root:has(#by-value:checked) .key-verdict, :root:has(#by-verdict:checked) .key-value,
:root:not(:has(#by-value:checked)) .key-value { display: none; }
.brief td { white-space: nowrap; }
.side { display: flex; flex-wrap: wrap; gap: 0 1.5rem; }
.side > div { max-width: 100%; }
.said { display: block; font-size: .92rem; line-height: 1.35; overflow-wrap: anywhere; }
.marks a { display: inline-block; min-width: 1.5rem; padding: .1rem .2rem; text-decoration: none;
  color: inherit; border-radius: 3px; }
.marks a:hover { background: var(--paper); }
.swatch { display: inline-block; width: 1.6rem; height: .9rem; border-radius: 3px;
  vertical-align: -.1rem; margin: 0 .25rem 0 .6rem; }
p > .swatch:first-child { margin-left: 0; }
.choice { border: 0; padding: 0; margin: .4rem 0; display: flex; flex-wrap: wrap;
  gap: .2rem 1.2rem; }
.choice legend { float: left; margin-right: 1rem; }
.points { border-collapse: collapse; border-spacing: 0; font-size: .95rem; }
.points th, .points td { border-bottom: 1px solid var(--line); }
.points td.n { text-align: right; }
.bad { color: #a33c00; font-weight: 600; }
@media (prefers-color-scheme: dark) { .bad { color: #f7b27a; } }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1rem; max-width: 60rem; }
dt { color: var(--soft-ink); } dd { margin: 0; overflow-wrap: anywhere; }
@media (max-width: 40rem) { main { padding: 1rem .8rem 3rem; } h1 { font-size: 1.5rem; }
  .map tbody th.claim { min-width: 10rem; } .brief td { min-width: 3.6rem; }
  dl { grid-template-columns: 1fr; } dd { margin-bottom: .4rem; } }
"""

_LIGHT = [_scale(name, *colours[:2]) for name, colours in SCALES.items()]
_DARK = [_scale(name, *colours[2:]) for name, colours in SCALES.items()]
# The rule that greys a map under "the value" stands between the two scales.
_GREY = ":root:has(#by-value:checked) .maps td[data-part] { background: var(--surface); }"
STYLE = "\n".join(
    [_LOOK, _LIGHT[0], "@media (prefers-color-scheme: dark) {", _DARK[0], "}", _GREY, _LIGHT[1],
     "@media (prefers-color-scheme: dark) {", _DARK[1], "}"]
)  # fmt: skip

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
{% if running %}<meta http-equiv="refresh" content="10">
{% endif %}
<title>Sweep of {{ state.chapter }}: {{ state.sweep }}</title>
<link rel="icon" href="data:,">
<style>{{ style | safe }}</style>
</head>
<body>
<main>
<h1>Sweep of {{ state.chapter }}</h1>
<p class="soft"><code>{{ state.sweep }}</code>, profile {{ state.profile }},
  {{ state.started[:16] | replace("T", " ") }} UTC</p>
<p>{{ ok }} of {{ points | length }} points finished
  {%- if failed %}, <span class="bad">{{ failed }} failed</span>{% endif %}
  {%- if state.state in ("running", "interrupted") %}; the sweep is {{ state.state }}{% endif %}.
  {% if axes %}Varied:
  {% for name, values in axes.items() %}<code>{{ name }}</code> ({{ values | length }} values)
  {{- ", " if not loop.last else "." }} {% endfor %}{% endif %}
  The runs took {{ "%.0f" | format(seconds) }} s in all.</p>
<p>The table of all claims and points: <a href="table.csv">CSV</a>,
  <a href="table.parquet">Parquet</a>. The sweep's record: <a href="sweep.json">JSON</a>.</p>

<h2>Claims by parameter</h2>
{% if overview %}
<p>In how many runs each claim held: in all of them, and in those with one value of a parameter.
  Claims whose verdict depends on a parameter come first.
</p>
<p><span class="swatch" style="background: var(--held)"></span>held
  <span class="swatch" style="background: var(--failed)"></span>not held</p>
<div class="scroll" tabindex="0" role="region" aria-label="Claims by parameter">
<table class="map brief">
<thead>
<tr><th rowspan="2" scope="col" style="text-align: left">Claim</th>
<th rowspan="2" scope="col">all</th>
{%- for name, values in axes.items() %}<th colspan="{{ values | length }}" scope="colgroup">
<code>{{ name }}</code></th>{% endfor %}</tr>
<tr>{% for values in axes.values() %}{% for value in values %}<th scope="col">{{ text(value) }}</th>
{%- endfor %}{% endfor %}</tr>
</thead>
<tbody>
{% for row in overview %}
<tr><th scope="row" class="claim"><a href="#claim-{{ loop.index }}">{{ row.says }}</a></th>
{%- for group in row.groups %}<td
{%- if group.part is not none %} data-part="{{ group.part }}"{% endif %}>
{%- if group.total %}{{ group.held }} of {{ group.total }}{% else %}–{% endif %}</td>
{%- endfor %}</tr>
{% endfor %}
</tbody>
</table>
</div>

<h2>Each claim</h2>
{% if maps %}
<fieldset class="choice">
<legend>Colour shows</legend>
<label><input type="radio" name="by" id="by-verdict" checked> the verdict</label>
<label><input type="radio" name="by" id="by-value"> the value</label>
</fieldset>
<p class="key-verdict"><span class="swatch" style="background: var(--held)"></span>held
  <span class="swatch" style="background: var(--failed)"></span>not held; in between where seeds
  disagree. A mark, ✓ or ✗, opens its run.</p>
<p class="key-value"><span class="swatch" style="background: var(--low)"></span>lowest
  <span class="swatch" style="background: var(--high)"></span>highest value of the claim in this
  sweep, where it is a number. A mark, ✓ or ✗, opens its run.</p>
<div class="maps">
{% for map in maps %}
<h3 id="claim-{{ loop.index }}">{{ map.says }} <code>{{ map.paper }}</code></h3>
<p class="soft">Reported: {{ map.reported }}
{%- if map.valued %}. Here: {{ "%.3g" | format(map.low) }} to {{ "%.3g" | format(map.high) }}
{%- endif %}</p>
<div class="side">
{% for table in map.tables %}
<div>
{% if table.title %}<h4>{{ table.title }}</h4>{% endif %}
<div class="scroll" tabindex="0" role="region" aria-label="{{ map.says }} {{ table.title }}">
<table class="map">
{% if map.x %}
<thead>
<tr><th scope="col">{% if map.y %}<code>{{ map.y }}</code> ↓ {% endif %}
<code>{{ map.x }}</code> →</th>
{%- for value in map.columns %}<th scope="col">{{ text(value) }}</th>{% endfor %}</tr>
</thead>
{% endif %}
<tbody>
{% for line in table.lines %}
<tr>{% if map.x %}<th scope="row">{{ text(line.value) if map.y else "" }}</th>{% endif %}
{% for cell in line.cells %}
<td{% if cell.part is not none %} data-part="{{ cell.part }}"{% endif %}
{%- if cell.depth is not none %} data-depth="{{ cell.depth }}"{% endif %}>
{%- if cell.total %}<span class="said">{{ cell.said }}</span>
{%- if cell.total > 1 %}{{ cell.held }} of {{ cell.total }} held {% endif %}
<span class="marks">{% for mark in cell.marks %}<a href="{{ mark.link }}" title="{{ mark.title }}"
 aria-label="{{ mark.title }}">{{ "✓" if mark.holds else "✗" }}</a>{% endfor %}</span>{% endif %}
{%- if cell.failed %} <span class="bad">{{ cell.failed }} failed</span>{% endif %}
{%- if cell.open %} <span class="soft">{{ cell.open }} to come</span>{% endif %}
{%- if not (cell.total or cell.failed or cell.open) %}–{% endif %}</td>
{% endfor %}</tr>
{% endfor %}
</tbody>
</table>
</div>
</div>
{% endfor %}
</div>
{% endfor %}
</div>
{% else %}
<p>No claim changed, neither its verdict nor what was measured.</p>
{% endif %}
{% if constant %}
<h3 id="constant">The same in every run</h3>
<div class="scroll" tabindex="0" role="region" aria-label="Claims that are the same in every run">
<table class="points">
<thead><tr><th scope="col">Claim</th><th scope="col">Reported</th><th scope="col">Here</th>
<th scope="col">Verdict</th></tr></thead>
<tbody>
{% for each in constant %}
<tr id="claim-{{ maps | length + loop.index }}"><td>{{ each.says }}
<code>{{ each.paper }}</code></td><td>{{ each.reported }}</td><td>{{ each.ours }}</td>
<td>{{ "held" if each.held else "not held" }}</td></tr>
{% endfor %}
</tbody>
</table>
</div>
{% endif %}
{% else %}
<p>No finished run has a claim.</p>
{% endif %}

<h2>Points</h2>
<div class="scroll" tabindex="0" role="region" aria-label="Points">
<table class="points">
<thead><tr>{% for name in axes %}<th scope="col"><code>{{ name }}</code></th>{% endfor %}
<th scope="col">Run</th><th scope="col">Claims held</th><th scope="col">Seconds</th>
<th scope="col">GiB</th><th scope="col">State</th></tr></thead>
<tbody>
{% for point in points %}
<tr>{% for name in axes %}<td>{{ text(point.parameters[name]) }}</td>{% endfor %}
<td>{% if point.link %}<a href="{{ point.link }}">{{ point.run }}</a>{% else %}–{% endif %}</td>
<td>{% if point.state == "ok" %}{{ point.held }} of {{ point.claims | length }}
{%- else %}–{% endif %}</td>
<td class="n">{{ point.seconds if point.seconds is not none else "–" }}</td>
<td class="n">{{ point.peak_gib if point.peak_gib is not none else "–" }}</td>
<td>{% if point.state == "failed" %}<span class="bad">failed</span>: {{ point.error }}
{%- else %}{{ "finished" if point.state == "ok" else point.state }}{% endif %}</td></tr>
{% endfor %}
</tbody>
</table>
</div>

<h2>The same in every point</h2>
<dl>
{% for name, value in state.fixed.items() %}
<dt><code>{{ name }}</code></dt><dd>{{ text(value) }}</dd>
{% endfor %}
<dt>Commit</dt><dd>{{ state.source.commit or "unknown" }}
{%- if state.source.dirty %}, with changes that are not committed{% endif %}</dd>
<dt>Versions</dt><dd>{% for name, version in versions.items() %}{{ name }} {{ version }}
{{- ", " if not loop.last }}{% endfor %}</dd>
{% if machines %}<dt>Machines</dt><dd>{{ machines | join("; ") }}</dd>{% endif %}
</dl>
</main>
</body>
</html>
"""
