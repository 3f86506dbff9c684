"""The form of the code: width, one statement per line, short cells, nothing unused, and how much of what a notebook
exports it also shows. As a program: `python tests/test_style.py [FILES]` lists what is wrong, `--write` also rewrites
shown.json."""
import ast, io, json, re, shutil, subprocess, sys, tokenize
from pathlib import Path
import nbformat, pytest

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted([*(ROOT/'nbs').glob('*.ipynb'), *ROOT.glob('studies/*/*.ipynb')])
SCRIPTS = sorted([*(ROOT/'tests').glob('*.py'), *(ROOT/'benchmarks').glob('*.py'), ROOT/'setup.py'])
RECORD = ROOT/'tests'/'shown.json'      # notebook -> how many public names it showed, and had, when this was written
WIDTH, CELL, SHARE = 120, 60, .8        # columns; lines of a code cell; least share of public names that are shown
GUARDS = (ast.Return, ast.Raise, ast.Continue, ast.Break)       # what may share the line of its `if`

def code_cells(path):
    "The place and the source of each of a notebook's code cells, except those with shell commands and magics."
    for i, c in enumerate(nbformat.read(path, 4).cells):
        if c.cell_type == 'code' and not re.search(r'^[%!]', c.source, re.M):
            yield i, c.source

def wide(source):
    "Lines of more than 120 columns."
    return [i for i, line in enumerate(source.splitlines(), 1) if len(line) > WIDTH]

def blocks(node):
    "The blocks of statements of a node of a syntax tree."
    found = [getattr(node, field, None) for field in ('body', 'orelse', 'finalbody')]
    return [b for b in found if isinstance(b, list) and b and isinstance(b[0], ast.stmt)]

def crowded(source):
    "Lines that hold a second statement, guard clauses aside."
    lines, bad = source.encode().splitlines(), set()
    for node in ast.walk(ast.parse(source)):
        for block in blocks(node):
            bad |= {b.lineno for a, b in zip(block, block[1:]) if b.lineno <= a.end_lineno}
            guard = isinstance(node, ast.If) and block is node.body and len(block) == 1 and isinstance(block[0], GUARDS)
            behind = lines[block[0].lineno-1][:block[0].col_offset].strip()
            if behind and not guard:
                bad.add(block[0].lineno)
    return sorted(bad)

def faults(source, where):
    "What is wrong with the form of a piece of code, a line each."
    return [*(f'{where}: line {i}: more than {WIDTH} columns' for i in wide(source)),
            *(f'{where}: line {i}: a second statement' for i in crowded(source))]

def notebook_faults(path):
    "What is wrong with the form of a notebook's code cells, a line each."
    found = []
    for i, source in code_cells(path):
        where = f'{path.name} cell {i}'
        found += faults(source, where)
        n = sum(bool(line.strip()) for line in source.splitlines())
        if n > CELL:
            found.append(f'{where}: {n} lines, expected at most {CELL}')
    return found

def public_names(path):
    "The public names of the module that a notebook exports."
    module = ROOT/'synthscale'/(re.sub(r'^\d+[a-z]*_', '', path.stem)+'.py')
    if path.parent.name != 'nbs' or not module.exists(): return []
    for node in ast.parse(module.read_text()).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], 'id', '') == '__all__':
            return ast.literal_eval(node.value)
    return []

def not_shown(path):
    "The public names that no cell of the lesson uses: cells that are exported or hidden do not count."
    used = set()
    for _, source in code_cells(path):
        if re.search(r'^#\| *(export|hide)', source, re.M): continue
        used |= {t.string for t in tokenize.generate_tokens(io.StringIO(source).readline) if t.type == tokenize.NAME}
    return [n for n in public_names(path) if n not in used]

def counts(path):
    "How many public names a notebook shows, and how many it has."
    n = len(public_names(path))
    return n-len(not_shown(path)), n

def write_record():
    "Note what every notebook shows now."
    found = {p.name: counts(p) for p in NOTEBOOKS if public_names(p)}
    lines = [f' {json.dumps(name)}: {json.dumps(pair)}' for name, pair in found.items()]
    RECORD.write_text('{\n'+',\n'.join(lines)+'\n}\n')

SECOND = [
    'a = 1; b = 2', 'for x in y: f(x)', 'while a: b()', 'with a: b()', 'try: a()\nexcept E: b()', 'def f(): return 1',
    'class A: pass', 'if a: b()', 'if a:\n    b()\nelse: c()', 'if a: return b; c()', "é = 'é'; b = 2"]
FINE = [
    'if a: raise b', 'for x in y:\n    if x: continue\n    if y: break', 'x = [\n    1,\n    2]', 'f = lambda a: a',
    'def f(a):\n    if a: return 1\n    return 2', 'if a:\n    b()\nelif c:\n    d()\nelse:\n    e()',
    '@d\ndef f():\n    return 1', 'try:\n    a()\nexcept E:\n    b()\nfinally:\n    c()']

@pytest.mark.parametrize('source', SECOND)
def test_a_second_statement_is_found(source):
    assert crowded(source)

@pytest.mark.parametrize('source', FINE)
def test_guard_clauses_and_blocks_are_fine(source):
    assert crowded(source) == []

@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda p: f'{p.parent.name}/{p.stem}')
def test_notebook_is_in_form(path):
    assert notebook_faults(path) == []

@pytest.mark.parametrize('path', SCRIPTS, ids=lambda p: f'{p.parent.name}/{p.stem}')
def test_script_is_in_form(path):
    assert faults(path.read_text(), path.name) == []

@pytest.mark.parametrize('path', [p for p in NOTEBOOKS if public_names(p)], ids=lambda p: p.stem)
def test_notebook_shows_what_it_exports(path):
    "At least four fifths of its public names, and no fewer than when shown.json was last written."
    shown, n = counts(path)
    before, _ = json.loads(RECORD.read_text()).get(path.name, (0, 0))
    assert shown >= SHARE*n, f'{shown} of {n} public names are shown; not {", ".join(not_shown(path))}'
    assert shown >= before, f'{shown} names are shown, {before} before; not {", ".join(not_shown(path))}'

def test_the_record_has_no_notebook_that_is_gone():
    assert {*json.loads(RECORD.read_text())} <= {p.name for p in NOTEBOOKS}

def test_ruff_finds_nothing():
    ruff = shutil.which('ruff', path=str(Path(sys.executable).parent)) or shutil.which('ruff')
    assert ruff, 'ruff is not installed; pip install -e ".[dev]" brings it'
    r = subprocess.run([ruff, 'check', '--no-cache', '--output-format', 'concise', '.'], cwd=ROOT, capture_output=True,
                       text=True)
    assert r.returncode == 0, r.stdout+r.stderr

def test_only_nbdevs_own_lists_are_wider_in_modules():
    "nbdev wraps __all__ at 120 columns and ten more; what we write, a title that becomes a docstring too, ends at 120."
    modules = [p for p in (ROOT/'synthscale').glob('*.py') if p.name != '_modidx.py']
    lines = {p.name: p.read_text().splitlines() for p in modules}
    assert [(n, i) for n, text in lines.items() for i in wide('\n'.join(text))
            if not text[i-1].startswith('__all__ = ')] == []

def report(path):
    "Print what is wrong with a file, and what of a notebook is not shown."
    if path.suffix != '.ipynb':
        print(*faults(path.read_text(), path.name), sep='\n', end='\n' if faults(path.read_text(), '') else '')
        return
    for line in notebook_faults(path):
        print(line)
    if public_names(path):
        shown, n = counts(path)
        print(f'{path.name}: {shown} of {n} public names shown; not: {" ".join(not_shown(path))}')

if __name__ == '__main__':
    given = [Path(a).resolve() for a in sys.argv[1:] if a != '--write']
    for p in given or [*NOTEBOOKS, *SCRIPTS]:
        report(p)
    if '--write' in sys.argv:
        write_record()

@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda p: p.stem)
def test_no_output_names_a_place_of_the_machine_that_ran_it(path):
    "Home folders, environments and temporary folders: whoever runs the notebook has others."
    shown = [json.dumps(c.outputs) for c in nbformat.read(path, 4).cells if c.cell_type == 'code']
    places = r'(?<![\w.:/])/(?:work|home|root|Users|opt|tmp|mnt|var|private)/|site-packages|' + re.escape(str(ROOT))
    assert [m for text in shown for m in re.findall(places, text)] == []
