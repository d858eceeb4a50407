"""Build the site: executed notebooks, API pages from the docments, status and results from the records -> docs/_site.

    python docs/execute.py && python docs/build.py [--readme]

Everything is local: MathJax and plotly come out of Python packages, and the build fails when a page would load anything from
another host or links to something that is not there. `--readme` writes README.md (and its figure, with a browser) from the front page.
"""

import argparse
import ast
import html
import importlib
import importlib.util
import inspect
import json
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import plotly  # noqa: E402
from fastcore.docments import docments  # noqa: E402

from modeltc_lab._modidx import d as index  # noqa: E402
from modeltc_lab.core import results  # noqa: E402
from modeltc_lab.core.cli import TECHNIQUES, experiments, technique_state  # noqa: E402

DOCS, BUILD = ROOT / "docs", ROOT / "docs" / "_build"
EXECUTED, SRC, SITE = BUILD / "executed", BUILD / "src", DOCS / "_site"
PLOTLY, TWIN, WIDGET = "application/vnd.plotly.v1+json", "application/vnd.modeltc.twin+json", "application/vnd.jupyter.widget-view+json"
ROOMS = {"core": "Core", "serving": "Serving", "decoding": "Decoding", "quant": "Quantization", "matting": "Matting", "diffusion": "Diffusion", "sparsity": "Sparsity",
         "balance": "Balance", "kernels": "Kernels", "compare": "Comparisons"}
LONG_TABLE = 40  # rows, above which a table of results is folded
KERNELS = {"paged decode attention": "paged_decode", "constrained decoding": "constrained", "varlen attention": "varlen_attention"}  # family and what its records begin with
EXTERNAL = re.compile(r"<(?:script|link|img|iframe|source)\b[^>]*?\b(?:src|href)=[\"']((?:https?:)?//[^\"']+)[\"']", re.I)


# --- names ---------------------------------------------------------------------------------------------------------------

def page_name(path):
    "The page of a notebook: its folder, and its name without the number."
    return (path.parent / re.sub(r"^\d+\w?_", "", path.stem)).as_posix()


def symbols():
    "Every public exported name: short name -> (module, anchor). Names that two modules share are left out."
    found = {}
    for module, names in index["syms"].items():
        for dotted in names:
            short = dotted.removeprefix(module + ".")
            if "." in short or short.startswith("_"): continue
            found.setdefault(short, []).append(module)
    return {name: modules[0] for name, modules in found.items() if len(modules) == 1}


SYMBOLS = symbols()


def linked(text, up):
    "Markdown with backticked names of ours linked to their API entry, and notebook paths to their pages."
    def name(match):
        module = SYMBOLS.get(match[1])
        return f"[`{match[1]}`]({up}api/{module.removeprefix('modeltc_lab.')}.html#api-{match[1]})" if module else match[0]

    def notebook(match):
        path = next((ROOT / "nbs" / match[1]).parent.glob(f"{Path(match[1]).name}.ipynb"), None)
        return f"[{match[1]}]({up}{page_name(Path(match[1]))}.html)" if path else match[0]

    parts = re.split(r"(```.*?```|\$\$.*?\$\$)", text, flags=re.S)
    for i in range(0, len(parts), 2):
        parts[i] = re.sub(r"(?<![\[`])`([A-Za-z_]\w*)`(?![\]`])", name, parts[i])
        parts[i] = re.sub(r"(?<!\[)`(\w+/\d+\w?_\w+)`", notebook, parts[i])
        parts[i] = re.sub(r"\]\(nbs/([\w/]+)\.ipynb\)", lambda m: f"]({up}{page_name(Path(m[1]))}.html)", parts[i])
    return "".join(parts)


# --- notebook cells ------------------------------------------------------------------------------------------------------

def script(data):
    "JSON for a script element."
    return '<script type="application/json">' + json.dumps(data, separators=(",", ":")).replace("</", "<\\/") + "</script>"


def figure_html(spec):
    "One figure, drawn by figures.js."
    layout = {k: v for k, v in spec["layout"].items() if k not in ("template", "width")}
    height = int(layout.get("height") or 430)
    return f'<div class="mlab-figure">{script(dict(data=spec["data"], layout=layout, frames=spec.get("frames", [])))}<div class="plot" style="height:{height}px"></div></div>'


def twin_html(spec):
    "A twin with all its controls."
    height = max(int(f["layout"].get("height") or 430) for f in spec["figures"])
    title = f'<p class="question">{html.escape(spec["title"])}</p>' if spec["title"] else ""
    return f'<div class="mlab-twin">{script(spec)}{title}<div class="controls"></div><div class="plot" style="height:{height}px"></div></div>'


def shown(output):
    "An output as the site shows it; None drops it."
    data = output.get("data")
    if data is None: return output if output.get("name") != "stderr" else None
    if TWIN in data: text = twin_html(data[TWIN])
    elif PLOTLY in data: text = figure_html(data[PLOTLY])
    elif WIDGET in data: text = '<p class="needs-kernel">An interactive control: open this notebook in JupyterLab (<code>make lab</code>) to move it. Its still twin is on this page.</p>'
    else: return output
    return {**output, "data": {"text/html": text}}


def markdown(text, cell_id="m"): return dict(cell_type="markdown", id=cell_id, metadata={}, source=text)


def only_imports(source):
    "Does a cell only import? Such cells are folded."
    try: body = ast.parse(source).body
    except SyntaxError: return False
    return bool(body) and all(isinstance(n, (ast.Import, ast.ImportFrom)) for n in body)


def cells(nb, up):
    "The cells of a page: directives obeyed and removed, outputs made static."
    for cell in nb["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            yield {**cell, "source": linked(source, up), "metadata": {}}
            continue
        if cell["cell_type"] != "code": continue
        directives = {k: v.strip() for k, v in re.findall(r"^#\|\s*([\w-]+)\s*:?[ \t]*(.*)$", source, flags=re.M)}
        if "hide" in directives or "default_exp" in directives: continue
        source = re.sub(r"^#\|.*\n?", "", source, flags=re.M)
        folded = directives.get("code-fold") == "true" or only_imports(source)
        tags = [tag for tag, when in (("remove-input", directives.get("echo") == "false"), ("remove-output", directives.get("output") == "false"),
                                      ("hide-input", folded), ("exported", "export" in directives)) if when]
        outputs = [o for o in map(shown, cell.get("outputs", [])) if o is not None]
        yield {**cell, "source": source, "outputs": outputs, "metadata": {"tags": tags}}


def heading(nb):
    "Title and subtitle of a notebook."
    lines = [line for line in "".join(nb["cells"][0]["source"]).splitlines() if line.strip()]
    return lines[0].removeprefix("# "), lines[1].removeprefix("> ")


def write_page(path, front=False):
    "One executed notebook as a page; returns (page name, title, subtitle)."
    nb, name = json.loads(path.read_text()), page_name(path.relative_to(EXECUTED))
    title, subtitle = heading(nb)
    up = "../" * name.count("/")
    body = list(cells({"cells": nb["cells"][1:]}, up))
    top = hero(title, subtitle) if front else f"# {title}\n\n<p class=\"lead\">{html.escape(subtitle)}</p>\n\n<p class=\"source-note\">Notebook <code>nbs/{path.relative_to(EXECUTED).as_posix()}</code>{api_note(nb, up)}</p>"
    nb["cells"] = [markdown(top, "top"), *body]
    nb["metadata"].pop("widgets", None)
    target = SRC / f"{name}.ipynb"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(nb))
    return name, title, subtitle


def api_note(nb, up):
    "Where the module a notebook exports is documented."
    found = re.search(r"#\|\s*default_exp (\S+)", "\n".join("".join(c["source"]) for c in nb["cells"] if c["cell_type"] == "code"))
    return f' · module <a href="{up}api/{found[1]}.html"><code>modeltc_lab.{found[1]}</code></a>' if found else ""


def hero(title, subtitle):
    "The top of the front page."
    return f"""# {title}

<div class="hero"><p class="name">modeltc<em>_lab</em></p><p class="promise">{html.escape(subtitle)}</p>
<div class="doors"><a class="first" href="serving/past_future.html">Read: Past-Future</a><a href="#two-commands">Install</a><a href="api.html">API</a><a href="status.html">What is verified</a></div></div>
"""


# --- API pages -----------------------------------------------------------------------------------------------------------

def written_types(function):
    "The annotations of a function as they stand in its source."
    try: tree = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
    except (OSError, TypeError, SyntaxError, IndexError): return {}
    if not isinstance(tree, ast.FunctionDef): return {}
    found = {a.arg: ast.unparse(a.annotation) for a in [*tree.args.posonlyargs, *tree.args.args, *tree.args.kwonlyargs] if a.annotation is not None}
    return found | ({"return": ast.unparse(tree.returns)} if tree.returns is not None else {})


def text_cell(value): return str(value if value is not None else "").replace("|", "\\|").replace("\n", " ").strip()


def parameters(function):
    "The parameter table of a function from its docments."
    try: notes = docments(function, full=True, returns=True)
    except Exception: return ""
    types, rows = written_types(function), []
    for name, note in notes.items():
        if name in ("self", "cls"): continue
        default = "" if name == "return" else "*required*" if note.default is inspect.Parameter.empty else f"`{text_cell(repr(note.default))}`"
        described = text_cell(note.docment)
        kind = text_cell(types.get(name, ""))
        if name == "return" and not (described or kind): continue
        rows.append(f"| {'**returns**' if name == 'return' else f'`{name}`'} | {f'`{kind}`' if kind else ''} | {default if len(default) < 60 else '…'} | {described} |")
    return "\n".join(["| parameter | type | default | description |", "|---|---|---|---|", *rows]) if rows else ""


def signature(name, thing):
    "A signature without annotations."
    try: s = inspect.signature(thing)
    except (ValueError, TypeError): return ""
    plain = [p.replace(annotation=inspect.Parameter.empty) for p in s.parameters.values() if p.name not in ("self", "cls")]
    texts = [f"{p.name}={p.default.__name__}" if isinstance(p.default, type) and p.default is not p.empty else str(p) for p in plain]
    shown = [t if len(t) < 60 else f"{p.name}=..." for t, p in zip(texts, plain)]
    return f"```python\n{name}({', '.join(shown)})\n```"


def fields(cls):
    "Attributes of a dataclass or record with the comment beside each."
    rows = []
    try: source = inspect.getsource(cls)
    except (OSError, TypeError): return ""
    for match in re.finditer(r"^    (\w+): ([^=#\n]+?)(?: = ([^#\n]+?))?\s*(?:#\s*(.*))?$", source, flags=re.M):
        if not match[1].startswith("_") and match[1] != "model_config": rows.append(f"| `{match[1]}` | `{text_cell(match[2])}` | {f'`{text_cell(match[3])}`' if match[3] else ''} | {text_cell(match[4])} |")
    return "\n".join(["| attribute | type | default | description |", "|---|---|---|---|", *rows]) if rows and ("@dataclass" in source or "NamedTuple" in source or "BaseModel" in source) else ""


def entry(name, thing):
    "One public name of a module, as Markdown."
    kind = "class" if inspect.isclass(thing) else "function" if callable(thing) else "value"
    out = [f'<a id="api-{name}"></a>', f"## {name}", f'<span class="api-kind">{kind}</span>', inspect.getdoc(thing) if kind != "value" and thing.__doc__ else ""]
    if kind == "value": return "\n\n".join([*out[:3], f"`{text_cell(repr(thing))[:300]}`"])
    table = fields(thing) if kind == "class" else ""
    if not (kind == "class" and getattr(thing, "_is_protocol", False)): out += [signature(name, thing), table or (parameters(thing.__init__ if kind == "class" else thing) if not (kind == "class" and issubclass(thing, BaseException)) else "")]
    if kind == "class":
        for method, function in vars(thing).items():
            inner = function.__func__ if isinstance(function, (classmethod, staticmethod)) else function.fget if isinstance(function, property) else function
            if method.startswith("_") or not inspect.isfunction(inner) or not inner.__doc__: continue
            out += [f"### {name}.{method}", inspect.getdoc(inner) or "", "" if isinstance(function, property) else signature(method, inner), "" if isinstance(function, property) else parameters(inner)]
    return "\n\n".join(part for part in out if part)


def public(module):
    "The classes and functions a module exports, in order; constants and aliases of other people's types are left out."
    return [n for n in module.__all__ if callable(thing := getattr(module, n, None)) and getattr(thing, "__module__", None) == module.__name__]


def sources():
    "Module -> the notebook it is exported from."
    found = {}
    for path in sorted(EXECUTED.rglob("*.ipynb")):
        exported = re.search(r"#\|\s*default_exp (\S+)", "\n".join("".join(c["source"]) for c in json.loads(path.read_text())["cells"] if c["cell_type"] == "code"))
        if exported: found[exported[1]] = page_name(path.relative_to(EXECUTED))
    return found


def write_api():
    "A page for every exported module and one that lists them."
    pages, explained = [], sources()
    for module_name in sorted(index["syms"]):
        module = importlib.import_module(module_name)
        names = public(module)
        short = module_name.removeprefix("modeltc_lab.")
        doc = (module.__doc__ or "").strip()
        text = [f"# {short}", f'<p class="lead">{html.escape(doc.splitlines()[0]) if doc else ""}</p>', f"`from {module_name} import ...`" + (f" · explained in [the notebook](../{explained[short]}.html)" if short in explained else ""), *[entry(n, getattr(module, n)) for n in names]]
        path = SRC / "api" / f"{short}.md"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n\n".join(text) + "\n")
        pages.append((f"api/{short}", short, doc.splitlines()[0] if doc else ""))
    return pages


# --- rendered pages ------------------------------------------------------------------------------------------------------

def status_rows():
    "Technique x where it ran x what was verified, from the records."
    records = results.read()
    rows = []
    for t in TECHNIQUES:
        room = t.module.split(".")[1]
        mine = [r for r in records if r.domain == room and (r.experiment.startswith(t.name) or not t.built)] if t.built else []
        cpu = sorted({r.experiment for r in mine if r.device.startswith("cpu")})
        gpu = sorted({r.experiment for r in mine if not r.device.startswith("cpu") and "compile" not in r.device})
        rows.append((t.title, technique_state(t), cpu, gpu))
    kernels = [r for r in records if r.domain == "kernels"]
    compiled = sorted({r.experiment for r in kernels if "compile" in r.device})
    timed = sorted({r.experiment for r in kernels if "compile" not in r.device})
    return rows, compiled, timed


def write_status():
    "The status matrix."
    rows, compiled, timed = status_rows()
    link = lambda room, names: ", ".join(f"[{n}](results.html#{room}-{n})" for n in names)
    rooms = {t.title: t.module.split(".")[1] for t in TECHNIQUES}
    yes, no = '<span class="yes">recorded</span>: ', '<span class="no">no record</span>'
    cell = lambda family, names: yes + link("kernels", mine) if (mine := [n for n in names if n.startswith(family)]) else no
    lines = ["# What is verified", '<p class="lead">Rendered from the records: a cell that says “recorded” has files behind it, anything else has not been measured.</p>', "## Techniques",
             "| technique | state | CPU | GPU |\n|---|---|---|---|\n" + "\n".join(
                 f"| {title} | {state} | {yes + link(rooms[title], cpu) if cpu else no} | {yes + link(rooms[title], gpu) if gpu else no} |" for title, state, cpu, gpu in rows),
             "## Kernels", "| family | interpreter on CPU | compiled for sm_90 | run on a GPU |\n|---|---|---|---|\n"
             + "\n".join(f"| {title} | test-suite | {cell(family, compiled)} | {cell(family, timed)} |" for title, family in KERNELS.items()),
             "A kernel that compiles for a GPU builds and fits; only a run on one shows that it is right and fast there."]
    (SRC / "status.md").write_text("\n\n".join(lines) + "\n")


def command_of(domain, experiment):
    "The one command that remakes a record."
    name = f"{domain}/{experiment}"
    if name in experiments(): return f"modeltc-lab run {name}"
    return {"decoding/vllm_backend": "bash tests/peers/vllm_structured.sh", "kernels/paged_decode_resources": "python kernels/bench/compile_check.py --write", "kernels/paged_decode_speed": "make gpu",
            "kernels/constrained_resources": "python kernels/bench/compile_check.py --write", "kernels/constrained_step": "make gpu",
            "kernels/varlen_attention_resources": "python kernels/bench/compile_check.py --write", "kernels/varlen_attention_speed": "make gpu",
            "serving/engine_contract": "bash tests/peers/transformers_versions.sh", "serving/vllm_plugin": "bash tests/peers/vllm_scheduler.sh",
            "serving/token_sim_vidur": "bash tests/peers/vidur_speed.sh", "serving/engine_validation_cuda": "modeltc-lab validate --device cuda --results docs/results"}[name]


def folded(table):
    "A table that would fill the page waits behind a line that says how long it is."
    rows = table.count("\n") - 1
    return table if rows <= LONG_TABLE else f"<details><summary>{rows} rows</summary>\n\n{table}\n\n</details>"


def write_results():
    "Every record, with the command that remakes it and the environment it came from."
    groups = {}
    for r in results.read(): groups.setdefault((r.domain, r.experiment), {}).setdefault(r.device, []).append(r)
    lines = ["# Results", '<p class="lead">Medians, with the range of the samples in brackets.</p>']
    for (domain, experiment), devices in groups.items():
        lines += [f'<a id="{domain}-{experiment}"></a>', f"## {domain}/{experiment}", f"```sh\n{command_of(domain, experiment)}\n```"]
        for device, records in devices.items():
            first = records[0]
            has_x = any(r.x is not None for r in records)
            versions = ", ".join(f"{k} {v}" for k, v in first.versions.items())
            lines += [f"**{device}**, {first.date}, commit {first.commit}; {versions}", folded(results.table(records, rows=("method", "x") if has_x else "method", cols="metric"))]
    (SRC / "results.md").write_text("\n\n".join(lines) + "\n")


def cards():
    "The techniques as cards for the front page."
    out = []
    for t in TECHNIQUES:
        state = technique_state(t).split(" (")[0]
        css = {"built": "built", "partly built": "partly"}.get(state, "")
        body = f'<strong>{html.escape(t.title)}</strong><span>{html.escape(t.what)}</span><i class="{css}">{state}</i>'
        out.append(f'<a href="{page_name(Path(t.notebook))}.html">{body}</a>' if t.built else f"<div>{body}</div>")
    return '<div class="cards">' + "".join(out) + "</div>"


def write_front(pages, api):
    "The front page: the index notebook, its technique table as cards, and the contents."
    path = SRC / "index.ipynb"
    nb = json.loads(path.read_text())
    for cell in nb["cells"]:
        text = json.dumps(cell.get("outputs", ""))
        if cell["cell_type"] == "code" and "what it does" in text: cell["outputs"] = [dict(output_type="display_data", metadata={}, data={"text/html": cards()})]
    tree = lambda caption, names, hidden=True: f"```{{toctree}}\n:caption: {caption}\n:hidden:\n\n" + "\n".join(names) + "\n```"
    toc = [tree("Contents", [*(f"{room}" for room in dict.fromkeys(n.split("/")[0] for n, *_ in pages)), "api", "status", "results", "log", "changelog"])]
    nb["cells"].append(markdown("\n\n".join(toc), "toc"))
    path.write_text(json.dumps(nb))
    for room in dict.fromkeys(n.split("/")[0] for n, *_ in pages):
        mine = [p for p in pages if p[0].startswith(room + "/")]
        listing = "\n".join(f'<a href="{n}.html"><strong>{html.escape(t)}</strong><span>{html.escape(s)}</span></a>' for n, t, s in mine)
        (SRC / f"{room}.md").write_text(f"# {ROOMS[room]}\n\n<div class=\"cards\">\n{listing}\n</div>\n\n```{{toctree}}\n:hidden:\n\n" + "\n".join(n for n, *_ in mine) + "\n```\n")
    listing = "\n".join(f'<a href="{n}.html"><strong>{html.escape(t)}</strong><span>{html.escape(s)}</span></a>' for n, t, s in api)
    (SRC / "api.md").write_text(f"# API\n\n<p class=\"lead\">From the docments of the exported modules.</p>\n\n<div class=\"cards\">\n{listing}\n</div>\n\n```{{toctree}}\n:hidden:\n\n" + "\n".join(n for n, *_ in api) + "\n```\n")


def write_llms(pages, api):
    "llms.txt: the site for language models; llms-full.txt with the text of the notebooks."
    title, promise = heading(json.loads((EXECUTED / "index.ipynb").read_text()))
    rows = [f"- [{t}]({n}.html): {s}" for n, t, s in pages]
    (SITE / "llms.txt").write_text("\n".join([f"# {title}", "", f"> {promise}", "", "## Notebooks", "", *rows, "", "## API", "", *[f"- [{t}]({n}.html): {s}" for n, t, s in api], "",
                                              "## Evidence", "", "- [What is verified](status.html)", "- [Results](results.html)", "- [Log](log.html)", "- [Changelog](changelog.html)", ""]))
    full = []
    for path in sorted(EXECUTED.rglob("*.ipynb")):
        for c in json.loads(path.read_text())["cells"]:
            text = "".join(c["source"])
            if c["cell_type"] == "markdown": full.append(text)
            elif c["cell_type"] == "code" and "#| hide" not in text: full.append(f"```python\n{text}\n```")
    (SITE / "llms-full.txt").write_text("\n\n".join(full) + "\n")


# --- checks --------------------------------------------------------------------------------------------------------------

def outside():
    "Anything a page would load from another host."
    return [f"{p.relative_to(SITE)}: {u}" for p in SITE.rglob("*.html") for u in EXTERNAL.findall(p.read_text())] + \
           [f"{p.relative_to(SITE)}: {u}" for p in [*SITE.glob("_static/site.css"), *SITE.glob("_static/figures.js")] for u in re.findall(r"https?://[^\s\"')]+", p.read_text())]


def dead_links():
    "Links between pages whose file or anchor is not there."
    bad, anchors = [], {}
    pages = {p: p.read_text() for p in SITE.rglob("*.html")}
    for p, text in pages.items(): anchors[p.resolve()] = set(re.findall(r'\bid="([^"]+)"', text))
    for p, text in pages.items():
        for href in re.findall(r'<a\b[^>]*?\bhref="([^"]+)"', text):
            if re.match(r"(https?:|mailto:|javascript:|data:)", href): continue
            path, _, anchor = html.unescape(href).partition("#")
            target = (p.parent / path).resolve() if path else p.resolve()
            if target.is_dir(): target = target / "index.html"
            if not target.is_file(): bad.append(f"{p.relative_to(SITE)}: {href}")
            elif anchor and target in anchors and anchor not in anchors[target]: bad.append(f"{p.relative_to(SITE)}: {href} (no such place)")
    return sorted(set(bad))


def build():
    "The whole site."
    for folder in (SRC, SITE): shutil.rmtree(folder, ignore_errors=True)
    SRC.mkdir(parents=True)
    notebooks = sorted(p for p in EXECUTED.rglob("*.ipynb") if p.name != "index.ipynb")
    if not notebooks: sys.exit("docs/build.py: no executed notebooks; run `python docs/execute.py` first")
    order = list(ROOMS)
    notebooks.sort(key=lambda p: (order.index(p.relative_to(EXECUTED).parts[0]), p.name))
    pages = [write_page(p) for p in notebooks]
    write_page(EXECUTED / "index.ipynb", front=True)
    api = write_api()
    write_front(pages, api)
    write_status()
    write_results()
    shutil.copy(DOCS / "log.md", SRC / "log.md")
    shutil.copy(ROOT / "CHANGELOG.md", SRC / "changelog.md")
    shutil.copy(DOCS / "conf.py", SRC)
    static = SRC / "_static"
    shutil.copytree(DOCS / "static", static)
    shutil.copy(Path(plotly.__file__).parent / "package_data" / "plotly.min.js", static)
    copy_mathjax(static / "mathjax")
    subprocess.run([sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-j", "2", str(SRC), str(SITE)], check=True)
    write_llms(pages, api)
    problems = [f"loads from another host: {x}" for x in outside()] + [f"dead link: {x}" for x in dead_links()]
    if problems: sys.exit("docs/build.py:\n" + "\n".join(problems[:20]))
    print(f"site: {len(list(SITE.rglob('*.html')))} pages, {sum(f.stat().st_size for f in SITE.rglob('*') if f.is_file()) / 1e6:.0f} MB, docs/_site/index.html")


def copy_mathjax(target):
    "The one script and the fonts of MathJax that the pages use, out of a Python package (found, not imported)."
    spec = importlib.util.find_spec("mathjax")
    if spec is None or spec.origin is None: sys.exit("docs/build.py: MathJax is missing; install modeltc_lab[docs]")
    source = Path(spec.origin).parent / "static" / "mathjax" / "es5"
    target.mkdir()
    shutil.copy(source / "tex-mml-chtml.js", target)
    shutil.copytree(source / "output" / "chtml" / "fonts" / "woff-v2", target / "output" / "chtml" / "fonts" / "woff-v2")


# --- README --------------------------------------------------------------------------------------------------------------

def readme_text():
    "The front page as Markdown for the repository."
    nb = json.loads((EXECUTED / "index.ipynb").read_text())
    title, promise = heading(nb)
    out = [f"# {title}", f"> {promise}"]
    for c in nb["cells"][1:]:
        source = "".join(c["source"])
        if c["cell_type"] == "markdown": out.append(source)
        if c["cell_type"] != "code" or "#| hide" in source: continue
        if "#| echo: false" not in source: out.append("```python\n" + re.sub(r"^#\|.*\n?", "", source, flags=re.M).strip() + "\n```")
        for o in c["outputs"]:
            data = o.get("data", {})
            if PLOTLY in data: out.append("![KV memory over time under four admission policies](docs/images/front.svg)")
            elif "text/markdown" in data: out.append("".join(data["text/markdown"]))
            elif o.get("name") == "stdout": out.append("```\n" + "".join(o["text"]).strip() + "\n```")
    return "<!-- made from nbs/index.ipynb by `python docs/build.py --readme` -->\n" + "\n\n".join(out) + "\n"


def readme_figure():
    "The front page's figure as SVG, drawn by a browser with the local plotly."
    from playwright.sync_api import sync_playwright
    spec = next(o["data"][PLOTLY] for c in json.loads((EXECUTED / "index.ipynb").read_text())["cells"] for o in c.get("outputs", []) if PLOTLY in o.get("data", {}))
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    spec["layout"] |= {"paper_bgcolor": "#ffffff", "plot_bgcolor": "#ffffff", "width": 900, "height": 520}
    with sync_playwright() as p:
        b = p.chromium.launch(executable_path=browser, args=["--no-sandbox", "--disable-gpu"])
        page = b.new_page()
        page.add_script_tag(path=str(Path(plotly.__file__).parent / "package_data" / "plotly.min.js"))
        uri = page.evaluate("s => Plotly.newPlot(document.body.appendChild(document.createElement('div')), s.data, s.layout).then(d => Plotly.toImage(d, {format: 'svg', width: 900, height: 520}))", spec)
        b.close()
    from urllib.parse import unquote
    target = DOCS / "images" / "front.svg"
    target.parent.mkdir(exist_ok=True)
    target.write_text(unquote(uri.split(",", 1)[1]))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--readme", action="store_true", help="write README.md and its figure instead of the site")
    if parser.parse_args().readme:
        readme_figure()
        (ROOT / "README.md").write_text(readme_text())
        print("README.md and docs/images/front.svg written")
    else: build()


if __name__ == "__main__": main()
