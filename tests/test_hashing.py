"Hashes of what code means: layout and words do not count, everything else does; the same on every Python."
import ast, hashlib, random, shutil, subprocess, sys, textwrap
import pytest
from hypothesis import given, strategies as st
from conftest import ROOT
from synthscale.hashing import canonical, closure, closure_hashes, code_hash, code_text, data_files, imported

MODULES = sorted(p for p in (ROOT/'synthscale').glob('[!_]*.py'))

def reworded(source, rng):
    "The same code with other comments, docstrings, blank lines and spacing."
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and ast.get_docstring(node) is not None:
            node.body[0].value.value = f'Other words {rng.random()}.'
    return ast.unparse(tree)+'\n\n# the end\n'                # drops comments, quotes and line breaks of its own

@pytest.mark.parametrize('path', MODULES, ids=lambda p: p.stem)
def test_words_and_layout_do_not_count(path):
    source = path.read_text()
    assert code_hash(reworded(source, random.Random(0))) == code_hash(source)

EDITS = [
    ('x = 1', 'x = 2'), ('x = 1', 'x = 1.0'), ('x = 1', 'y = 1'), ('x = "1"', 'x = 1'), ('x = -1', 'x = 1'),
    ('x: int = 1', 'x: float = 1'), ('x = a.b', 'x = a.c'), ('a = 1\nb = 2', 'b = 2\na = 1'),
    ("f'{a}b'", "f'{a}c'"), ("f'{a:.2f}'", "f'{a:.3f}'"), ('import a', 'import b'), ('assert a, "x"', 'assert a, "y"'),
    ('if a:\n    b()', 'if a:\n    b()\nelse:\n    c()'), ('def f(a, b=1): return a', 'def f(a, b=2): return a'),
    ('@d\ndef f(): pass', 'def f(): pass'), ('def f(): yield 1', 'async def f(): yield 1')]

@pytest.mark.parametrize('before, after', EDITS)
def test_code_counts(before, after):
    assert code_hash(before) != code_hash(after)

@given(st.integers(-5, 5), st.integers(-5, 5))
def test_values_count(a, b):
    assert (code_hash(f'x = {a}') == code_hash(f'x = {b}')) == (a == b)

SAMPLE = textwrap.dedent('''
    from __future__ import annotations
    import os
    def f(x: int = 3, *a, k='v', **kw) -> str:
        "Doc."
        return f"{x!r:>{k}}" f"and {a}" "tail"
    class A:
        "Doc."
        y: list[int] = [i for i in range(3) if i]
    async def g():
        async with A() as b: await b
    lam = lambda *, z=1: (yield z)
    try: pass
    except* ValueError as e: raise
    match lam:
        case {"a": [1, *rest]} if rest: print(rest)
''')
SAMPLE_HASH = '5abd63b2608d27ac5e661c729100d11996c71a88996ee0a3162c13cbb2c20ce1'

def test_the_hash_is_a_constant():
    "Computed with Python 3.11; 3.12 and later must find the same, or a colleague's study would be stale."
    assert code_hash(SAMPLE) == SAMPLE_HASH

F_STRINGS = {      # code -> its one text: Python 3.12 and later would write some with the outer quotes inside
    """f'{d["a"]}'""": """f"{d['a']}\"""", """f"{d['a']}" """: """f"{d['a']}\"""", "f'{x}'  # a remark": "f'{x}'",
    """f"it's {x!r:>{w}}" """: """f"it's {x!r:>{w}}\"""", """f'{f"{y}"}z'""": """f"{f'{y}'}z\"""",
    "f'{ {1: 2}[1] }'": "f'{ {1: 2}[1]}'", "f'{x=}'": "f'x={x!r}'", "f'{{{x}}}'": "f'{{{x}}}'",
    "f\"{a['x']} {b[\'\'\'y\'\'\']} it's\"": 'f"{a[\'x\']} {b[\'y\']} it\'s"',
    "g(f'{a}' 'b' f'{c}')": "g(f'{a}b{c}')",
    "f'{x:%Y-%m}\\n'": "f'{x:%Y-%m}\\n'",
    "(n)": "n"}

@pytest.mark.parametrize('source', F_STRINGS)
def test_code_has_one_text(source):
    assert code_text(source) == F_STRINGS[source]
    assert code_text(code_text(source)) == code_text(source)

@pytest.mark.parametrize('path', MODULES, ids=lambda p: p.stem)
def test_the_text_of_a_module_is_the_same_code(path):
    source = path.read_text()
    assert canonical(ast.parse(code_text(source))) == canonical(ast.parse(source))

def runs(python):
    "Whether a command is a Python that runs; a version manager has commands that only say what to install."
    return bool(shutil.which(python)) and subprocess.run([python, '-c', ''], capture_output=True).returncode == 0

OTHERS = [p for p in (f'python3.{n}' for n in range(11, 15) if n != sys.version_info.minor) if runs(p)]

@pytest.mark.skipif(not OTHERS, reason='no other Python is on the path')
@pytest.mark.parametrize('python', OTHERS)
def test_another_python_writes_the_same_text_of_every_module(python):
    code = ("import hashlib, sys; sys.path.insert(0, sys.argv[1]); from hashing import code_text\n"
            "for p in sys.argv[2:]:\n"
            "    print(hashlib.sha256(code_text(open(p, encoding='utf-8').read()).encode()).hexdigest())")
    run = subprocess.run([python, '-W', 'ignore', '-c', code, str(ROOT/'synthscale'), *map(str, MODULES)],
                         capture_output=True, text=True, check=True)
    assert run.stdout.split() == [hashlib.sha256(code_text(p.read_text()).encode()).hexdigest() for p in MODULES]

def test_imports_of_every_form_are_found():
    source = textwrap.dedent('''
        import synthscale.train as t
        from synthscale import laws
        from synthscale.study import Study
        from .data import x
        from . import forms
        def f():
            from synthscale.quality import q
        import numpy
        from os import path
    ''')
    assert imported(source) == ['data', 'forms', 'laws', 'quality', 'study', 'train']

def test_the_closure_is_what_python_imports():
    "Everything that a module loads of this package at import is in its closure."
    for name in ('classify', 'generate', 'laws', 'report', 'quality'):
        code = f'import sys, synthscale.{name}; print(*[m for m in sys.modules if m.startswith("synthscale.")])'
        run = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True, cwd=ROOT)
        loaded = {m.split('.')[1] for m in run.stdout.split()}
        assert loaded and loaded <= {*closure([name], ROOT/'synthscale')}, name

def test_circles_end(tmp_path):
    (tmp_path/'a.py').write_text('from .b import x')
    (tmp_path/'b.py').write_text('def f():\n    from synthscale.a import y')
    assert closure(['a'], tmp_path) == ['a', 'b']

def test_the_import_graph_has_no_circle():
    "No module of the package imports, at any depth, one that imports it."
    for p in MODULES:
        for m in imported(p.read_text()):
            if m == p.stem: continue
            assert p.stem not in closure([m], ROOT/'synthscale'), f'{p.stem} and {m} import each other'

def test_data_files_are_part_of_a_closure(tmp_path):
    (tmp_path/'a.py').write_text("T = package_data('t.csv')\nU = package_data('u.csv')")
    assert data_files((tmp_path/'a.py').read_text()) == ['t.csv', 'u.csv']
    with pytest.raises(FileNotFoundError, match='t.csv'):
        closure_hashes(['a'], tmp_path)
    (tmp_path/'tables').mkdir()
    for f in ('t.csv', 'u.csv'):
        (tmp_path/'tables'/f).write_text('1')
    before = closure_hashes(['a'], tmp_path)
    (tmp_path/'tables'/'u.csv').write_text('2')
    after = closure_hashes(['a'], tmp_path)
    assert [k for k in before if before[k] != after[k]] == ['u.csv']
