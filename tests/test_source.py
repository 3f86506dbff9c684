"The notebooks are the source: what is exported, cleaned and written from them is what is committed."
import ast, re, shutil
import nbformat, pytest
from conftest import ROOT, copy_repo, load, sh
from synthscale.run import readme_text, stage_of

NOTEBOOKS = sorted((ROOT/'nbs').glob('*.ipynb'))
PIPELINE = load(ROOT/'dvc.yaml')['stages']

def same(a, b, pattern):
    "Files that differ between two trees."
    return [p.name for p in sorted(a.glob(pattern)) if p.read_bytes() != (b/p.relative_to(a)).read_bytes()]

def test_export_and_clean_change_nothing(tmp_path):
    d = copy_repo(tmp_path/'repo')
    sh('git init -q && nbdev_export && nbdev_clean', d)
    assert same(ROOT, d, 'synthscale/*.py') == []
    assert same(ROOT, d, 'nbs/*.ipynb') == []

def test_readme_is_what_its_notebook_makes(tmp_path):
    d = copy_repo(tmp_path/'repo', skip=('remote/',))
    sh(['python', '-m', 'synthscale.run', 'readme'], d)
    assert same(ROOT, d, 'README.md') == []
    assert same(ROOT, d, 'nbs/index.ipynb') == []

@pytest.mark.parametrize('name', sorted(p.parent.name for p in ROOT.glob('studies/*/findings.ipynb')))
def test_findings_are_what_their_notebook_makes(tmp_path, name):
    d = copy_repo(tmp_path/'repo', skip=('remote/',))
    sh(['python', '-m', 'synthscale.run', 'readme', '--study', f'studies/{name}'], d)
    assert same(ROOT, d, f'studies/{name}/README.md') == []
    assert same(ROOT, d, f'studies/{name}/findings.ipynb') == []

@pytest.mark.parametrize('path', [p for p in NOTEBOOKS if stage_of(p) in PIPELINE], ids=lambda p: p.stem)
def test_stage_notebook_keeps_its_parameters_tag(path):
    nb = nbformat.read(path, 4)
    tagged = [c for c in nb.cells if 'parameters' in c.metadata.get('tags', [])]
    assert len(tagged) == 1 and 'study_dir: str' in tagged[0].source
    assert all('#' in line for line in tagged[0].source.split('\n')), 'every parameter says what it means'

def imports(module, seen=None):
    "The modules of this package that a module imports, at any depth."
    seen = set() if seen is None else seen
    if module in seen: return seen
    seen.add(module)
    for node in ast.walk(ast.parse((ROOT/'synthscale'/f'{module}.py').read_text())):
        if isinstance(node, ast.ImportFrom):      # nbdev writes imports of the package as relative ones
            if node.level == 1 and node.module: imports(node.module, seen)
            elif (node.module or '').startswith('synthscale.'): imports(node.module.split('.')[1], seen)
        if isinstance(node, ast.Import):
            for a in node.names:
                if a.name.startswith('synthscale.'): imports(a.name.split('.')[1], seen)
    return seen

@pytest.mark.parametrize('stage', [s for s in PIPELINE if s != 'strip'])
def test_stage_depends_on_the_import_closure_of_its_module(stage):
    spec = PIPELINE[stage]
    deps = spec.get('do', spec)['deps']
    modules = {m.group(1) for d in deps if (m := re.match(r'\$\{root\}/synthscale/(\w+)\.py', d))}
    assert modules == imports(stage)
    assert [d for d in deps if d.startswith('build/nbs/') and stage_of(d) == stage]

def test_every_parameter_is_a_dependency():
    "A key of params.yaml that no stage depends on could change without a rerun."
    params, tracked = load(ROOT/'params.yaml'), set()
    for spec in PIPELINE.values():
        for p in spec.get('do', spec).get('params', []): tracked.add(re.sub(r'\$\{(key|item\.\w+)\}', '*', p))
    def leaves(d, path=()):
        for k, v in d.items(): yield from leaves(v, (*path, k)) if isinstance(v, dict) else [(*path, k)]
    def covered(path):
        return any(len(t := p.split('.')) <= len(path) and all(a in ('*', b) for a, b in zip(t, path)) for p in tracked)
    assert [p for p in leaves(params) if p != ('root',) and not covered(p)] == []

def test_study_pipelines_are_copies_of_the_root():
    for p in ROOT.glob('studies/*/dvc.yaml'): assert p.read_bytes() == (ROOT/'dvc.yaml').read_bytes(), p

def test_public_functions_are_documented():
    for p in sorted((ROOT/'synthscale').glob('[!_]*.py')):
        for node in ast.parse(p.read_text()).body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith('_'): assert ast.get_docstring(node), f'{p.name}: {node.name}'

def test_import_is_fast():
    out = sh(['python', '-X', 'importtime', '-c', 'import synthscale, synthscale.study, sys; assert not {"torch", "timm", "diffusers", "pandas"} & set(sys.modules)'], ROOT)
    assert 'synthscale' in out
