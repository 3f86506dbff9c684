"The pipeline as its users meet it: DVC, killed runs, clones, experiments, own studies. Everything runs the real thing."
import json, os, random, shutil, subprocess, sys, time
import pandas as pd, psutil, pytest
from conftest import WAIT, edit, environment, forget, load, ran, sh

pytestmark = pytest.mark.slow
AGGREGATES = {'results', 'laws', 'report'}
TABLES = ('curves', 'summary', 'compute_check', 'quality', 'laws', 'comparisons', 'exchange', 'crossovers', 'forecasts',
          'added_data', 'model_selection', 'factors', 'plot_loss')

def tables(d):
    "The tables of a study, all but its costs."
    return {t: (d/'results'/f'{t}.csv').read_bytes() for t in TABLES}

def fails(d, cmd='dvc repro'):
    "What a command says that fails."
    return sh(cmd, d, ok=False)

def test_from_nothing_every_out_is_there(finished):
    assert ran((finished.parent/'first.log').read_text()) == {
        'prepare', 'data@digits', 'data@rendered', 'models@mini_sd', 'prompts@names', 'prompts@described',
        'prompts@styles', 'generate@names_g2',
        'evaluators@real_classifier', 'quality_sources@names_g2', 'classify@digits', 'classify_sources@names_g2',
        'classify_mixtures@grid', *AGGREGATES}
    figures = ('scaling_test', 'scaling_ood', 'mixing', 'per_class_recall', 'samples', 'guidance', 'quality',
               'prompt_sets', 'grid', 'exchange', 'exponents', 'residuals', 'recognized')
    for f in ('results/headline.json', 'runs/classify/digits.ipynb', *(f'figures/{f}.png' for f in figures)):
        assert (finished/f).stat().st_size > 500, f
    assert not list((finished/'build').glob('failed/*'))
    costs = pd.read_csv(finished/'results'/'costs.csv')
    assert {'data', 'models', 'generate', 'evaluators', 'quality', 'classify', 'laws'} <= set(costs.stage)
    assert (costs.cpu_s > 0).all() and (costs.peak_mb > 50).all()

def test_nothing_changed_nothing_runs(repo):
    out = sh('dvc repro', repo)
    assert ran(out) == set() and 'up to date' in out
    assert sh('git status --porcelain', repo) == ''

# ---- one thing more, or other: only what depends on it runs

def test_a_new_guidance_scale_is_generated_alone(repo):
    def add(p):
        sources = p['generate']['sources']
        sources['styles_g4'] = {**sources['names_g2'], 'prompts': 'styles', 'guidance_scale': 4.0, 'n_images': 60,
                                'curve': {'n_images': [20, 40]}}
    edit(repo, add)
    new = {'generate@styles_g4', 'quality_sources@styles_g4', 'classify_sources@styles_g4'}
    assert ran(sh('dvc repro', repo)) == {'prepare', *new, *AGGREGATES}
    factors = pd.read_csv(repo/'results'/'factors.csv')
    assert 'styles_g4' not in set(factors.curve)             # it has no point at the study's factor size
    edit(repo, lambda p: p['prompts']['sets']['styles'].update(templates=['a {weight} {name}']))
    assert ran(sh('dvc repro prompts', repo)) == {'prepare', 'prompts@styles'}
    stale = set(json.loads(sh('dvc status --json', repo)))
    assert 'generate@styles_g4' in stale and 'generate@names_g2' not in stale

def test_a_set_is_added_alone_and_leaves_nothing_when_it_is_removed(repo):
    before, original = tables(repo), (repo/'params.yaml').read_bytes()
    def add(p):
        p['data']['sets']['plain'] = {**p['data']['sets']['rendered'], 'warp': 0.5}
        p['quality']['sets']['plain'] = {'n_images': 40}
        p['classify']['curves']['plain'] = {'set': 'plain', 'n_images': [20, 40]}
    edit(repo, add)
    assert ran(sh('dvc repro', repo)) == {'prepare', 'data@plain', 'quality_sets@plain', 'classify@plain', *AGGREGATES}
    assert 'plain' in set(pd.read_csv(repo/'results'/'curves.csv').curve)
    def less(p):
        del p['quality']['sets']['plain'], p['classify']['curves']['plain']
    edit(repo, less)
    assert ran(sh('dvc repro', repo)) == {'prepare', *AGGREGATES}
    assert tables(repo) == before
    left = ['costs/data-plain.json', 'data/plain', 'data/plain.ipynb']
    assert sorted(p.relative_to(repo/'runs').as_posix() for p in (repo/'runs').glob('*/*plain*')) == left
    (repo/'params.yaml').write_bytes(original)
    assert ran(sh('dvc repro', repo)) <= {'prepare', *AGGREGATES}
    assert tables(repo) == before and not list((repo/'runs').glob('*/*plain*'))
    sh('dvc push -q && git add -A && git commit -qm back', repo)
    sh('git clone -q repo clone', repo.parent)
    out = sh('dvc repro --pull', repo.parent/'clone')
    assert ran(out) == set()                                             # no stale folder or file is in any hash

def test_a_filtered_and_a_merged_set_are_made_alone(repo):
    def add(p):
        p['filters'] = dict(clear_g2=dict(set='names_g2', evaluator='real_classifier', min_confidence=.01,
                                          duplicates='near'))
        p['merged'] = dict(both=dict(first='rendered', second='digits', n_second=40))
    edit(repo, add)
    assert ran(sh('dvc repro', repo)) == {'prepare', 'filters@clear_g2', 'merged@both', 'results', 'report'}
    left = pd.read_parquet(repo/'sets'/'clear_g2'/'manifest.parquet')
    assert 0 < len(left) <= len(pd.read_parquet(repo/'sets'/'names_g2'/'manifest.parquet'))
    both = pd.read_parquet(repo/'sets'/'both'/'manifest.parquet')
    assert len(both[both.split == 'train']) == 120+40

def test_prompts_that_a_model_writes_are_made_alone_and_generated_from(repo):
    from synthscale.smoke import smoke_text_models
    more = smoke_text_models()
    def add(p):
        p['models'] |= more['models']
        p['prompts'] |= dict(written=more['written'], captions=more['captions'])
        p['generate']['sources']['sentences_g2'] = {**p['generate']['sources']['names_g2'], 'prompts': 'sentences',
                                                    'n_images': 40, 'curve': {}}
    edit(repo, add)
    new = {'prompts_written@sentences', 'prompts_captions@captioned', 'generate@sentences_g2'}
    wanted = f"dvc repro {' '.join(new)}"
    assert ran(sh(wanted, repo)) == {'prepare', 'models@mini_lm', 'models@mini_captioner', *new}
    made = {n: (repo/'runs'/'prompts'/f'{n}.csv').read_bytes() for n in ('sentences', 'captioned')}
    t = pd.read_csv(repo/'runs'/'prompts'/'sentences.csv', keep_default_na=False)
    assert list(t) == ['class', 'label', 'prompt', 'origin', 'names_other'] and len(t) == 40
    assert set(pd.read_parquet(repo/'sets'/'sentences_g2'/'manifest.parquet').prompt) <= set(t.prompt)
    assert ran(sh(wanted, repo)) == set()
    for n, before in made.items():
        (repo/'runs'/'prompts'/f'{n}.csv').unlink()
        sh(f'synthscale prompts -p name {n}', repo)
        assert (repo/'runs'/'prompts'/f'{n}.csv').read_bytes() == before
    edit(repo, lambda p: p['prompts']['written']['sentences'].update(per_class=5))
    assert ran(sh(wanted, repo)) == {'prepare', 'prompts_written@sentences', 'generate@sentences_g2'}

# ---- clones

def test_a_clone_pulls_everything_with_no_network(repo):
    sh('git clone -q repo clone', repo.parent)
    clone = repo.parent/'clone'
    sh('dvc pull', clone)
    assert (clone/'sets'/'rendered'/'manifest.parquet').exists()
    assert (clone/'evaluators'/'real_classifier'/'model.safetensors').exists()
    m = pd.read_parquet(clone/'sets'/'names_g2'/'manifest.parquet')
    assert {'prompt', 'seed', 'guidance_scale', 'model', 'model_sha256'} <= set(m)
    assert m.caption.eq(m.prompt).all() and m.seed.is_unique
    draw = ("import torch; from diffusers import DiffusionPipeline; "
            "pipe = DiffusionPipeline.from_pretrained('models/mini_sd', dtype=torch.float32); "
            "print(pipe('a bold zero', num_inference_steps=2).images[0].size)")
    assert '(8, 8)' in sh(['python', '-c', draw], clone)                  # the cached model is an ordinary pipeline
    out = sh('dvc repro --pull', clone)
    assert ran(out) == set() and 'up to date' in out
    assert sh('git status --porcelain', clone) == ''

# ---- kills

def point_files(d):
    "The finished points of a study."
    return list((d/'build').glob('points/*/*.json'))

def repro_and_kill(d, moment):
    """`dvc repro`, with dvc alone killed at a moment, as a person or an OOM killer does it: its children must end by
    themselves, and no point may be lost or half-written. `moment` gets what dvc has said, until it is true."""
    env, said = environment() | {'LOKY_MAX_CPU_COUNT': '2', 'PYTHONUNBUFFERED': '1'}, d.parent/'said.txt'
    with open(said, 'w') as out:
        cmd = [sys.executable, '-m', 'dvc', 'repro', '--no-run-cache']
        p = subprocess.Popen(cmd, cwd=d, env=env, stdout=out, stderr=subprocess.DEVNULL)
    while p.poll() is None and not moment(said.read_text()):
        time.sleep(.05)
    tree = psutil.Process(p.pid).children(recursive=True) if p.poll() is None else []
    before = len(point_files(d))
    p.kill()
    p.wait()
    _, alive = psutil.wait_procs(tree, timeout=WAIT)
    alive = [a for a in alive if a.is_running() and a.status() != psutil.STATUS_ZOMBIE]
    assert not alive, 'a child process outlived the run'
    assert len(point_files(d)) >= before
    for f in point_files(d):
        json.loads(f.read_text())

def later(seconds):
    "A moment: so many seconds after dvc has begun its first stage."
    began = []
    def moment(said):
        if not began and ran(said):
            began.append(time.time())
        return began and time.time() > began[0]+seconds
    return moment

SAME = ('results/headline.json', 'runs/classify/digits.ipynb', 'runs/laws/laws.ipynb',
        'sets/rendered/manifest.parquet', 'sets/names_g2/manifest.parquet')

def test_sigkill_while_curves_are_trained(repo):
    "Two kills at random moments and one after the first point of a curve: what comes out is as if there had been none."
    want, same = tables(repo), {f: (repo/f).read_bytes() for f in SAME}
    sh('rm -rf build/points runs/classify runs/laws results figures', repo)
    forget(repo, {'classify', 'classify_sources', 'classify_mixtures', *AGGREGATES})
    rng = random.Random(0)
    repro_and_kill(repo, lambda said: point_files(repo))
    for _ in range(2):
        repro_and_kill(repo, later(rng.uniform(0, 12)))
    assert 'report' in ran(sh('dvc repro --no-run-cache', repo))
    assert tables(repo) == want
    for f, data in same.items():
        assert (repo/f).read_bytes() == data, f

@pytest.mark.campaign
def test_sigkill_at_any_moment_then_repro_finishes(repo):
    "The whole study from nothing with seven kills: tables, notebooks and sets are those of an uninterrupted run."
    want, same = tables(repo), {f: (repo/f).read_bytes() for f in SAME}
    sh('rm -rf build runs sets models evaluators results figures .dvc/cache/runs dvc.lock', repo)
    rng = random.Random(0)
    for _ in range(7):
        repro_and_kill(repo, later(rng.uniform(0, 22)))
    assert 'report' in ran(sh('dvc repro --no-run-cache', repo))
    assert tables(repo) == want
    for f, data in same.items():
        assert (repo/f).read_bytes() == data, f

def test_a_killed_worker_stops_the_stage_and_loses_nothing(repo):
    sh('rm -rf build/points runs/classify', repo)
    edit(repo, lambda p: p['recipes']['convnext_digits'].update(samples_seen_at_100=6400))
    sh(['synthscale', 'prepare'], repo)
    cmd = [sys.executable, '-m', 'synthscale.run', 'classify', '-p', 'curve', 'digits', '-p', 'workers', '2']
    p = subprocess.Popen(cmd, cwd=repo, env=environment(), stderr=subprocess.PIPE, text=True)
    while not point_files(repo) and p.poll() is None:
        time.sleep(.1)
    commands = {c: ' '.join(c.cmdline()) for c in psutil.Process(p.pid).children(recursive=True)}
    workers = [c for c, words in commands.items() if 'loky' in words and 'resource_tracker' not in words]
    assert workers
    workers[0].kill()
    err = p.communicate(timeout=WAIT)[1]
    done = {f: f.read_bytes() for f in point_files(repo)}
    assert p.returncode in (0, 1) and done
    assert not p.returncode or 'synthscale: ' in err
    sh(['synthscale', 'classify', '-p', 'curve', 'digits'], repo)
    assert (repo/'runs'/'classify'/'digits'/'curve.csv').exists()
    assert all(f.read_bytes() == data for f, data in done.items())

# ---- bad input, through the pipeline

def test_an_unknown_key_stops_before_anything_runs(repo):
    edit(repo, lambda p: p['recipes']['convnext_digits'].update(learning_rate=.1))
    out = fails(repo)
    assert ran(out) == {'prepare'} and "unknown key 'recipes.convnext_digits.learning_rate'" in out

def test_a_set_that_does_not_exist(repo):
    edit(repo, lambda p: p['classify']['curves']['digits'].update(set='digitz'))
    assert 'digitz' in fails(repo)                # DVC comes first, and knows no such folder
    assert "did you mean 'digits'" in sh(['synthscale', 'check'], repo, ok=False)

def test_more_images_than_the_set_holds(repo):
    edit(repo, lambda p: p['classify']['curves']['digits'].update(n_images=[20, 80, 5000]))
    out = fails(repo)
    assert "curve 'digits', real images: set 'digits' has" in out and '5000 were asked for' in out

def test_a_flipped_byte_in_a_shard_is_named_and_mended(repo):
    shard = next((repo/'sets'/'names_g2').glob('*.tar.gz'))
    good = shard.read_bytes()
    bad = bytearray(good)
    bad[len(bad)//2] ^= 1
    os.chmod(shard, 0o644)
    shard.unlink()
    shard.write_bytes(bad)
    out = sh(['synthscale', 'quality', '-p', 'name', 'names_g2'], repo, ok=False)
    assert f'{shard.name}: the shard is damaged' in out
    sh('dvc repro', repo)                    # DVC sees the damage too, and brings the set back
    assert shard.read_bytes() == good

def test_a_missing_row_is_named(repo):
    f = repo/'runs'/'classify'/'digits'/'curve.csv'
    df = pd.read_csv(f)
    f.unlink()
    df.drop(index=5).to_csv(f, index=False)
    out = sh(['synthscale', 'results'], repo, ok=False)
    assert '1 of ' in out and 'rows are missing' in out and "'curve': 'digits'" in out
    shutil.rmtree(f.parent)
    out = sh(['synthscale', 'results'], repo, ok=False)
    assert "digits/curve.csv: no such file; 'dvc repro classify@digits' makes it" in out

@pytest.mark.parametrize('place, stage', [('classify/names_g2/curve.csv', 'classify_sources@names_g2'),
                                          ('classify/grid/curve.csv', 'classify_mixtures@grid'),
                                          ('quality/names_g2/quality.csv', 'quality_sources@names_g2')])
def test_the_stage_that_makes_a_missing_file_is_named(repo, place, stage):
    (repo/'runs'/place).unlink()
    assert f"'dvc repro {stage}' makes it" in sh(['synthscale', 'results'], repo, ok=False)
    assert sh(f'dvc stage list --name-only {stage}', repo).split() == [stage]

def test_a_class_missing_from_a_source(repo, tmp_path):
    own_study(repo, tmp_path)
    shutil.rmtree(tmp_path/'images'/'photos'/'train'/'dog')
    out = sh(['synthscale', 'data', '-p', 'name', 'photos'], repo, ok=False)
    assert "split 'train': no image of class 'dog': the class is missing from this set" in out

def test_a_study_folder_without_data(repo):
    sh('rm -rf data sets .dvc/cache remote', repo)
    out = fails(repo)
    assert 'data' in out and ('missing' in out.lower() or 'does not exist' in out)
    assert "is not there; 'dvc pull'" in sh(['synthscale', 'data', '-p', 'name', 'digits'], repo, ok=False)

# ---- your own images, without generation and without DVC

def own_study(repo, tmp_path):
    "Two image folders of 16x16 colour images, as a user has them, and the study's params.yaml for them."
    import numpy as np
    from PIL import Image
    rng = np.random.default_rng(0)
    for name, n in (('photos', 16), ('generated', 24)):
        for split in ('train', 'val', 'test') if name == 'photos' else ('train',):
            for c, shade in (('cat', 60), ('dog', 160)):
                d = tmp_path/'images'/name/split/c
                d.mkdir(parents=True)
                for i in range(n):
                    pixels = rng.integers(shade-50, shade+50, (16, 16, 3), np.uint8)
                    Image.fromarray(pixels).save(d/f'{i:03d}.png')
    def change(p):
        p['study'] = dict(name='mine', seed=1, classes=['cat', 'dog'])
        p['data'] |= dict(image_size=12, channels=3)
        sets = {k: dict(type='imagefolder', input=str(tmp_path/'images'/k)) for k in ('photos', 'generated')}
        sets['generated']['synthetic'] = True
        p['data']['sets'] = sets
        for section in ('models', 'prompts', 'generate', 'filters', 'merged', 'report'):
            p.pop(section, None)
        evaluator = dict(n_images=20, recipe='convnext_digits')
        p['evaluators'] = dict(real_classifier=dict(evaluator, set='photos'),
                               in_domain_classifier=dict(evaluator, set='generated'))
        p['quality']['sets'] = dict(generated=dict(n_images=20))
        curves = {k: dict(set=k, n_images=n) for k, n in (('photos', [8, 16, 32]), ('generated', [16, 40]))}
        mixed = dict(real='photos', synthetic='generated', n_real=[8], n_synthetic=[16, 40])
        p['classify'] |= dict(
            eval=dict(set='photos', validation='val', test_splits=['test'], ood_set='photos', in_domain_set='photos'),
            curves=curves,
            mixtures=dict(mixed=mixed))
        p['laws'] = dict(fit_range=dict(photos=[8, 32]))
    edit(repo, change)
    sh(['synthscale', 'prepare'], repo)

def test_classify_on_your_own_image_folders(repo, tmp_path):
    own_study(repo, tmp_path)
    for s in ('photos', 'generated'):
        sh(['synthscale', 'data', '-p', 'name', s], repo)
    sh(['synthscale', 'classify', '-p', 'curve', 'mixed'], repo)
    df = pd.read_csv(repo/'runs'/'classify'/'mixed'/'curve.csv')
    assert set(df.train_sets) == {'photos+generated'} and set(df.test_set) == {'val', 'test'}
    assert df[(df.metric == 'top1')].value.mean() > .8

def test_classify_on_your_own_shards(repo, tmp_path):
    own_study(repo, tmp_path)
    sh(['synthscale', 'data', '-p', 'name', 'photos'], repo)
    m = pd.read_parquet(repo/'sets'/'photos'/'manifest.parquet')
    shards = tmp_path/'shards'
    shards.mkdir()
    shutil.copytree(repo/'sets'/'photos', shards/'train')
    new = dict(type='webdataset', input=str(shards), synthetic=True)
    edit(repo, lambda p: p['data']['sets'].update(generated=new))
    sh(['synthscale', 'prepare'], repo)
    sh(['synthscale', 'data', '-p', 'name', 'generated'], repo)
    assert len(pd.read_parquet(repo/'sets'/'generated'/'manifest.parquet')) == len(m)
    out = sh(['synthscale', 'classify', '-p', 'curve', 'generated'], repo, ok=False)
    assert 'training images are also test images' in out      # the shards held the test split too: a named leak

# ---- DVC across commits

def test_metrics_plots_and_experiments_across_commits(repo):
    sh('git tag before', repo)
    out = sh('dvc exp run -S +classify.curves.digits.seeds=3 -n third 2>&1', repo)
    assert {'classify@digits', 'report'} <= ran(out) and 'classify_sources@names_g2' not in ran(out)
    sh('git add -A && git commit -qm third', repo)
    diff = json.loads(sh('dvc metrics diff before --json', repo))
    assert any('k.digits.test.k' in k for f in diff.get('diff', diff).values() for k in f.get('data', f))
    page = sh('dvc plots diff before', repo)
    html = (repo/'dvc_plots'/'index.html').read_text()
    assert 'file://' in page and 'test_set' in html and html.count('names_g2') > 4
    assert 'before' in html and 'workspace' in html
    assert 'third' in sh('dvc exp show --csv -A', repo)
    shown = sh('dvc params diff before', repo)
    assert 'classify.curves.digits.seeds' in shown and '3' in shown

def test_an_experiment_in_a_temporary_copy_runs_the_copys_code(repo):
    sh('dvc exp run --temp -S +laws.fit_range.digits=[20,40] -n temp', repo)
    assert 'temp' in sh('dvc exp show --csv', repo)
    assert sh('git status --porcelain', repo) == ''

def test_a_study_of_its_own(repo):
    "studies/NAME is a DVC repository of its own: its faults do not stop the root, nor the root's its."
    sh(['python', '-c', "from synthscale.run import new_study; new_study('studies/mine', '.')"], repo)
    d = repo/'studies'/'mine'
    assert load(d/'params.yaml')['root'] == '../..' and load(d/'params.yaml')['study']['name'] == 'mine'
    shutil.copytree(repo/'data', d/'data')
    sh('dvc add -q data && dvc remote add -q -d store store', d)
    def less(p):
        "no generator and one curve: a study may leave out whole sections"
        for section in ('models', 'prompts', 'generate', 'filters', 'merged', 'evaluators', 'quality', 'report'):
            del p[section]
        del p['data']['sets']['rendered'], p['classify']['mixtures']
        p['laws'] = {}
    edit(d, less)
    stages = ran(sh('dvc repro', d))
    assert stages == {'prepare', 'data@digits', 'classify@digits', *AGGREGATES}
    assert set(pd.read_csv(d/'results'/'curves.csv').study) == {'mine'}
    sh('dvc push -q && git add -A && git commit -qm mine', d)
    assert ran(sh('dvc repro', repo)) == set()
    sh('dvc pull', repo)
    (d/'params.yaml').write_text('broken: [')
    assert ran(sh('dvc repro', repo)) == set()                            # a broken study does not stop the root

def test_push_and_pull_over_webdav(repo):
    "A real WebDAV server on loopback."
    pytest.importorskip('wsgidav', reason='wsgidav (dev requirement) is not installed')
    store = repo.parent/'store'
    (store/'dvc').mkdir(parents=True)
    code = """
import sys
from cheroot import wsgi
from wsgidav.wsgidav_app import WsgiDAVApp
app = WsgiDAVApp({'provider_mapping': {'/': sys.argv[1]}, 'simple_dc': {'user_mapping': {'*': True}}, 'verbose': 0,
                  'logging': {'enable': False}})
s = wsgi.Server(('127.0.0.1', 0), app)
s.prepare()
print(s.bind_addr[1], flush=True)
s.serve()
"""
    server = subprocess.Popen([sys.executable, '-c', code, str(store)], stdout=subprocess.PIPE, text=True)
    try:
        port = int(server.stdout.readline())
        sh(f'dvc remote add -q web webdav://127.0.0.1:{port}/dvc && dvc push -q -r web', repo)
        assert len(list(store.rglob('*'))) > 20
        sh('git add -A && git commit -qm web && git clone -q . ../clone', repo)
        clone = repo.parent/'clone'
        sh('rm -rf remote && dvc pull -q -r web', clone)
        manifest = 'sets/rendered/manifest.parquet'
        assert (clone/manifest).read_bytes() == (repo/manifest).read_bytes()
        assert ran(sh('dvc repro', clone)) == set()
    finally:
        server.kill()
        server.wait()
