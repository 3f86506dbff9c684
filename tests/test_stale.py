"What makes a stage stale: words never do, code does where it is used, and finished work is found again."
import ast, hashlib, re, shutil
import nbformat, pytest
from conftest import edit, ran, sh
from synthscale.run import RUN_HEADING

pytestmark = pytest.mark.slow

# ---- words

def docstrings(source):
    "The lines, from 0, on which a docstring begins."
    kinds = (ast.Module, ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    nodes = [n for n in ast.walk(ast.parse(source)) if isinstance(n, kinds) and ast.get_docstring(n) is not None]
    return [n.body[0].lineno-1 for n in nodes]

def reworded(source):
    "The same code with one more word in each docstring, a comment and a blank line more at both ends."
    lines = source.split('\n')
    for i in docstrings(source):
        lines[i] = re.sub(r'("""|"|\'\'\'|\')', r'\1Really: ', lines[i], count=1)
    first = next((i for i, l in enumerate(lines) if not l.startswith('#|')), len(lines))      # directives come first
    return '\n'.join([*lines[:first], '# a remark', '', *lines[first:], '', '# another remark'])

def reword_notebook(path):
    "Other words in every cell of a notebook, and one cell of prose more."
    nb = nbformat.read(path, 4)
    for c in nb.cells:
        if c.cell_type == 'markdown' and not c.source.startswith(RUN_HEADING):
            c.source += '\n\nOne more sentence.'
        if c.cell_type == 'code' and not re.search('^[%!]', c.source, re.M):
            c.source = reworded(c.source) if not in_run_section(nb, c) else f'# a remark\n\n{c.source}  # and another'
    nb.cells.insert(1, nbformat.v4.new_markdown_cell('Prose that was not there.', id='prose'))
    path.write_text(nbformat.writes(nb, indent=1)+'\n')

def in_run_section(nb, cell):
    "Whether a cell is below the heading of the section that a stage runs."
    heads = [i for i, c in enumerate(nb.cells) if c.source.startswith(RUN_HEADING)]
    return bool(heads) and nb.cells.index(cell) > heads[0]

def test_words_in_every_notebook_and_module_rerun_prepare_alone(repo):
    modules, notebooks = sorted((repo/'synthscale').glob('[!_]*.py')), sorted((repo/'nbs').glob('*.ipynb'))
    assert len(modules) > 25 and len(notebooks) > 25
    for p in modules:
        p.write_text(reworded(p.read_text()))
    for p in notebooks:
        reword_notebook(p)
    assert ran(sh('dvc repro', repo)) == {'prepare'}

def test_checkpoints_and_caches_of_editors_are_not_seen(repo):
    for folder in ('nbs', 'synthscale'):
        for name in ('.ipynb_checkpoints', '__pycache__'):
            (repo/folder/name).mkdir(exist_ok=True)
            (repo/folder/name/'01_data-checkpoint.ipynb').write_text('{}')
    out = sh('dvc repro', repo)
    assert ran(out) == set() and 'up to date' in out
    assert sh('git status --porcelain', repo) == ''

# ---- code and parameters

def in_module(repo, module, old, new):
    "Change a module and the notebook that it is written from alike."
    path, places = repo/'synthscale'/f'{module}.py', 0
    text = path.read_text()
    assert text.count(old) == 1, f'{module}: {old!r}'
    path.write_text(text.replace(old, new))
    for p in (repo/'nbs').glob('*.ipynb'):
        nb = nbformat.read(p, 4)
        for c in nb.cells:
            if c.cell_type != 'code' or '#| export' not in c.source or old not in c.source: continue
            c.source, places = c.source.replace(old, new), places+1
        p.write_text(nbformat.writes(nb, indent=1)+'\n')
    assert places == 1, f'{module}: {places} cells hold {old!r}'

def signature(repo, module, name):
    "The text of a function from its `def` to the end of its docstring's first line, as it is in the module."
    text = (repo/'synthscale'/f'{module}.py').read_text()
    node = next(n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.FunctionDef) and n.name == name)
    return '\n'.join(text.split('\n')[node.lineno-1:node.body[0].end_lineno]), ' '*node.body[0].col_offset

def use_a_constant(repo, module, name):
    "A new constant, used by a function: code that changes no number."
    head, indent = signature(repo, module, name)
    in_module(repo, module, head, f'ADDED = 1\n\n{head}\n{indent}assert ADDED')

def test_code_and_options_of_the_report_rerun_it_alone(repo):
    use_a_constant(repo, 'report', 'make_report')
    assert ran(sh('dvc repro', repo)) == {'prepare', 'report'}
    edit(repo, lambda p: p['report'].update(factors_n_images=40))
    assert ran(sh('dvc repro', repo)) == {'prepare', 'report'}
    (repo/'params.yaml').write_text('# a comment\n'+(repo/'params.yaml').read_text())
    assert ran(sh('dvc repro', repo)) == {'prepare'}

def importers(repo, module):
    "The stage names of dvc.yaml whose notebooks reach a module."
    out = set()
    for p in (repo/'build'/'nbs').glob('*.ipynb'):
        if module in nbformat.read(p, 4).metadata.code:
            out.add(re.sub(r'^\d+[a-z]*_', '', p.stem))
    return out

def forbid_training(repo):
    "A code edit after which nothing can be trained: what succeeds has found its work finished."
    for module, name in (('train', 'train_net'), ('loop', 'run')):
        head, indent = signature(repo, module, name)
        in_module(repo, module, head, f"{head}\n{indent}raise RuntimeError('something is trained again')")

def kept_files(repo):
    "Hashes of what is not to be made again, and of the points, which say when they were trained."
    files = [p for d in ('models', 'evaluators', 'runs/classify') for p in (repo/d).rglob('*')]
    return {p.relative_to(repo).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in files if p.is_file()}

where_trained = pytest.param('where it was trained', marks=pytest.mark.campaign)     # the clone has less to go by

@pytest.mark.parametrize('where', [where_trained, 'in a fresh clone'])
def test_code_of_the_trainer_reruns_stages_and_trains_nothing(repo, where):
    if where == 'in a fresh clone':
        sh('git clone -q repo clone', repo.parent)
        shutil.rmtree(repo)
        repo = repo.parent/'clone'
        sh('dvc pull -q', repo)
        assert not (repo/'build'/'points').exists() and not (repo/'build'/'models').exists()
    before, stale = kept_files(repo), importers(repo, 'train') | importers(repo, 'loop')
    assert {'models', 'evaluators', 'classify'} <= stale
    assert not {'data', 'prompts', 'generate', 'results', 'laws'} & stale
    forbid_training(repo)
    again = {s.split('@')[0].split('_')[0] for s in ran(sh('dvc repro', repo))}
    # the smoke study has none of these
    not_there = {'adapted', 'filters', 'merged', 'retrieved', 'clip', 'clip_scores', 'your_task'}
    assert again == {'prepare', 'report', *stale-not_there}           # report: it tells what stages cost
    assert kept_files(repo) == before

# ---- a stage runs what prepare has seen, or nothing

def refuses(repo, *words, stage='results'):
    "A stage that is run by hand ends with an error that says all of this, before it writes anything."
    before = {p: p.stat().st_mtime_ns for p in (repo/'results').iterdir()}
    out = sh(['python', '-m', 'synthscale.run', stage], repo, ok=False)
    assert all(w in out for w in (*words, 'synthscale.run prepare')) and 'Traceback' not in out, out
    assert {p: p.stat().st_mtime_ns for p in (repo/'results').iterdir()} == before

def test_a_stage_refuses_code_that_prepare_has_not_seen(repo):
    use_a_constant(repo, 'results', 'collect')
    refuses(repo, '07a_results.ipynb was prepared from other code', 'results')
    use_a_constant(repo, 'study', 'derive_seed')
    refuses(repo, 'results, study')
    sh(['synthscale', 'prepare'], repo)
    sh(['synthscale', 'results'], repo)

def halves(path):
    "A file as a full disk or a killed copy leaves it: gone, empty, and half."
    data = path.read_bytes()
    path.unlink()
    yield 'gone'
    for n in (0, len(data)//2):
        path.write_bytes(data[:n])
        yield n
    path.write_bytes(data)

def test_a_stage_refuses_a_damaged_copy_of_its_notebook(repo):
    for _ in halves(repo/'build'/'nbs'/'07a_results.ipynb'):
        refuses(repo, '07a_results.ipynb')

def test_a_stage_refuses_damaged_parameters(repo):
    for _ in halves(repo/'build'/'params.json'):
        refuses(repo, 'params.json')

def test_a_stage_refuses_a_params_yaml_that_prepare_has_not_seen(repo):
    (repo/'params.yaml').write_text((repo/'params.yaml').read_text()+'# later\n')
    refuses(repo, 'params.yaml has changed')
    sh(['synthscale', 'prepare'], repo)
    sh(['synthscale', 'results'], repo)
