"The notebooks are the source: what is exported, cleaned and written from them is what is committed."
import ast, copy, re
import nbformat, pytest
from conftest import ROOT, copy_repo, load, sh
from synthscale.params import resolved
from synthscale.stages import stage_of
from synthscale.study import Study

NOTEBOOKS = sorted((ROOT/'nbs').glob('*.ipynb'))
PIPELINE = load(ROOT/'dvc.yaml')['stages']

def same(a, b, pattern):
    "Files that differ between two trees."
    return [p.name for p in sorted(a.glob(pattern)) if p.read_bytes() != (b/p.relative_to(a)).read_bytes()]

def test_export_and_clean_change_nothing(tmp_path):
    d = copy_repo(tmp_path/'repo')
    sh('git init -q && nbdev-export && nbdev-clean', d)
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

def texts(spec, key):
    "The dependencies of a stage of dvc.yaml, or the keys that it takes from build/params.json."
    found = spec.get('do', spec).get(key, [])
    return found if key == 'deps' else [k for f in found for keys in f.values() for k in keys]

@pytest.mark.parametrize('stage', list(PIPELINE))
def test_stage_depends_on_its_own_notebook_for_code(stage):
    "The copy in build/nbs has the hashes of the code that it imports; only prepare, which writes it, sees the code."
    deps = texts(PIPELINE[stage], 'deps')
    code = [d for d in deps if d.startswith(('${root}', 'build/', 'nbs/', 'synthscale/'))]
    if stage == 'prepare':
        assert code == ['${root}/nbs', '${root}/synthscale']
        return
    command = re.search(r'synthscale.run (\w+)', str(PIPELINE[stage])).group(1)
    [own] = code
    assert stage_of(own) == command and (ROOT/'nbs'/own.split('/')[-1]).exists()

def tracked(params):
    "The parts of build/params.json that some stage depends on: key of dvc.yaml, * for any name -> what is there."
    keys = {re.sub(r'\$\{[^}]*\}', '*', k) for spec in PIPELINE.values() for k in texts(spec, 'params')}
    return {k: below(params, k.split('.')) for k in keys}

def below(d, parts):
    "What is under a key of nested dicts, * for any name."
    if not parts: return d
    if parts[0] == '*': return {k: below(v, parts[1:]) for k, v in d.items()}
    return below(d[parts[0]], parts[1:])

def leaves(d, path=()):
    "The paths of nested dicts to what is no dict, or to an empty one."
    if not isinstance(d, dict) or not d: return [path]
    return [p for k, v in d.items() for p in leaves(v, (*path, str(k)))]

def covers(key, path):
    "Whether a key of dvc.yaml is at or above a path."
    parts = key.split('.')
    return len(parts) <= len(path) and all(a in ('*', b) for a, b in zip(parts, path))

ELSEWHERE = {       # no stage depends on these, because build/params.json has them also where they are used
    'generate.n_images': 'in every source', 'generate.steps': 'in every source',
    'quality.n_images': 'in every scored set', 'recipes': 'in every curve and evaluator that is trained by one',
    'filters': 'nothing, if there is none', 'merged': 'nothing, if there is none',
    'retrieved': 'nothing, if there is none', 'adapted': 'nothing, if there is none',
    'prompts.written': 'nothing, if there is none', 'prompts.captions': 'nothing, if there is none',
    'clip.pools': 'nothing, if there is none', 'quality.clip': 'nothing, if there is none',
    'your_task': 'nothing, if there is none'}

def test_every_parameter_is_a_dependency():
    "A parameter that no stage depends on could change without a rerun."
    params = resolved(Study(ROOT))
    lost = ['.'.join(p) for p in leaves(params) if not any(covers(k, p) for k in tracked(params))]
    assert [p for p in lost if not any(covers(k, p.split('.')) for k in ELSEWHERE)] == []

@pytest.mark.parametrize('key, value', [
    ('generate.n_images', 20), ('generate.steps', 3), ('quality.n_images', 7),
    ('classify.seeds', 2), ('classify.recipe', 'vit_tiny_digits'), ('classify.one_seed_above', 30),
    ('classify.balance', 'own'),
    ('recipes.convnext_digits.label_smoothing', .2)])
def test_a_default_of_many_reaches_each_that_has_none_of_its_own(key, value):
    before, raw = Study(ROOT), copy.deepcopy(Study(ROOT).raw)
    *parts, last = key.split('.')
    below(raw, parts)[last] = value
    then, now = tracked(resolved(before)), tracked(resolved(Study(ROOT, raw)))
    assert then.keys() == now.keys() and then != now

def test_study_pipelines_are_copies_of_the_root():
    for p in ROOT.glob('studies/*/dvc.yaml'):
        assert p.read_bytes() == (ROOT/'dvc.yaml').read_bytes(), p

def test_each_study_folder_is_a_dvc_repository_of_its_own():
    "Else the root's `dvc status`, `commit` and `repro -P` take its stages for their own, made or not."
    assert [p.parent.name for p in ROOT.glob('studies/*/dvc.yaml') if not (p.parent/'.dvc'/'config').exists()] == []

def test_public_functions_are_documented():
    for p in sorted((ROOT/'synthscale').glob('[!_]*.py')):
        for node in ast.parse(p.read_text()).body:
            if not isinstance(node, (ast.FunctionDef, ast.ClassDef)) or node.name.startswith('_'): continue
            assert ast.get_docstring(node), f'{p.name}: {node.name}'

def test_import_is_fast():
    heavy = '{"torch", "timm", "diffusers", "pandas"} & set(sys.modules)'
    code = f'import synthscale, synthscale.study, sys; assert not {heavy}'
    out = sh(['python', '-X', 'importtime', '-c', code], ROOT)
    assert 'synthscale' in out

def test_the_lock_holds_no_stage_that_is_gone():
    "DVC keeps the entries of renamed and removed stages for ever, and reads them each time."
    kept, there = load(ROOT/'dvc.lock')['stages'], sh('dvc stage list --name-only', ROOT).split()
    assert {*kept} == {*there}
