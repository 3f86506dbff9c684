"The pipeline as its users meet it: DVC, killed runs, clones, experiments, studies of their own. Everything here runs the real thing."
import json, os, random, re, shutil, signal, subprocess, sys, time
from pathlib import Path
import nbformat, pandas as pd, psutil, pytest
from conftest import ROOT, copy_repo, dump, edit, environment, load, ran, sh

pytestmark = pytest.mark.slow
AGGREGATES = {'results', 'laws', 'report'}
TABLES = ('curves', 'summary', 'compute_check', 'quality', 'laws', 'comparisons', 'worth', 'gains', 'choices', 'factors', 'plot_loss')

def tables(d): return {t: (d/'results'/f'{t}.csv').read_bytes() for t in TABLES}

def fails(d, cmd='dvc repro'): return sh(cmd, d, ok=False)

def test_from_nothing_every_out_is_there(finished):
    assert {'strip', 'data@digits', 'data@typeset', 'models@mini_sd', 'prompts', 'generate@names_g2', 'judges@judge_real', 'quality@names_g2', 'classify@real', 'classify@names_g2', *AGGREGATES} <= ran((finished.parent/'first.log').read_text())
    for f in ('figures/scaling_test.png', 'figures/scaling_shift.png', 'figures/mixing.png', 'figures/per_class_recall.png', 'figures/samples.png', 'figures/guidance.png', 'figures/quality.png', 'figures/prompt_sets.png', 'figures/grid.png', 'results/headline.json', 'runs/classify/real.ipynb'):
        assert (finished/f).stat().st_size > 500
    assert not list((finished/'build').glob('failed/*'))

def test_nothing_changed_nothing_runs(repo):
    out = sh('dvc repro', repo)
    assert ran(out) == set() and 'up to date' in out
    assert sh('git status --porcelain', repo) == ''

def change_notebook(repo, name, kind, edit_source):
    p = repo/'nbs'/name
    nb = nbformat.read(p, 4)
    c = next(c for c in reversed(nb.cells) if c.cell_type == kind)
    c.source = edit_source(c.source)
    p.write_text(nbformat.writes(nb, indent=1)+'\n')

def test_a_prose_edit_reruns_nothing(repo):
    for n in ('06_classify.ipynb', '08_laws.ipynb'): change_notebook(repo, n, 'markdown', lambda s: s+'\n\nOne more sentence.')
    assert ran(sh('dvc repro', repo)) == {'strip'}

def test_a_code_edit_reruns_its_stage_and_what_depends_on_it(repo):
    change_notebook(repo, '08_laws.ipynb', 'code', lambda s: s+'\n')
    assert ran(sh('dvc repro', repo)) == {'strip'}                     # white space is no code
    change_notebook(repo, '08_laws.ipynb', 'code', lambda s: s.rstrip()+'.head(3)')
    assert ran(sh('dvc repro', repo)) == {'strip', 'laws'}             # the same tables come out, so the report is not rerun
    (repo/'synthscale'/'laws.py').write_text((repo/'synthscale'/'laws.py').read_text()+'\n')
    assert ran(sh('dvc repro', repo)) == {'laws', 'report'}            # report imports laws

def test_adding_a_guidance_scale_draws_it_alone(repo):
    def add(p):
        p['generate']['sources']['names_g4'] = {**p['generate']['sources']['names_g2'], 'guidance_scale': 4.0, 'n_images': 40}
        p['quality']['sources']['names_g4'] = {'set': 'names_g4', 'n_images': 40}
        p['classify']['curves']['names_g4'] = {'recipe': 'convnext_digits', 'real': 'names_g4', 'synthetic': 'names_g4', 'n_real': [0], 'n_synthetic': [20, 40], 'seeds': 2}
    edit(repo, add)
    assert ran(sh('dvc repro', repo)) == {'strip', 'generate@names_g4', 'quality@names_g4', 'classify@names_g4', *AGGREGATES}
    factors = pd.read_csv(repo/'results'/'factors.csv')
    assert 'names_g4' not in set(factors.curve)                           # it has no point at the study's factor size, and none is made up
    edit(repo, lambda p: p['prompts']['sets']['styles'].update(templates=['a {weight} {name}']))
    assert {'prompts', 'generate@styles_g1', 'classify@styles_g1'} <= (r := ran(sh('dvc repro', repo))) and 'generate@names_g2' not in r

def test_adding_a_source_runs_it_alone_and_removing_it_leaves_nothing(repo):
    before = tables(repo)
    def add(p):
        p['data']['sets']['plain'] = {**p['data']['sets']['typeset'], 'warp': 0.5}
        p['quality']['sources']['plain'] = {'set': 'plain', 'n_images': 40}
        p['classify']['curves']['plain'] = {'recipe': 'convnext_digits', 'real': 'plain', 'synthetic': 'plain', 'n_real': [0], 'n_synthetic': [20, 40], 'seeds': 2}
    original = (repo/'params.yaml').read_bytes()
    edit(repo, add)
    assert ran(sh('dvc repro', repo)) == {'strip', 'data@plain', 'quality@plain', 'classify@plain', *AGGREGATES}
    assert 'plain' in set(pd.read_csv(repo/'results'/'curves.csv').curve)
    (repo/'params.yaml').write_bytes(original)
    assert ran(sh('dvc repro', repo)) <= {'strip', *AGGREGATES}
    assert tables(repo) == before
    sh('dvc push -q && git add -A && git commit -qm back', repo)
    sh('git clone -q repo clone', repo.parent)
    out = sh('dvc repro --pull', repo.parent/'clone')
    assert ran(out) == set()                                             # no stale folder is in any hash

def test_a_clone_pulls_everything_with_no_network(repo):
    sh('git clone -q repo clone', repo.parent)
    clone = repo.parent/'clone'
    sh('dvc pull', clone)
    assert (clone/'sets'/'typeset'/'manifest.parquet').exists() and (clone/'judges'/'judge_real'/'model.safetensors').exists()
    m = pd.read_parquet(clone/'sets'/'names_g2'/'manifest.parquet')
    assert {'prompt', 'seed', 'guidance_scale', 'model', 'model_sha256'} <= set(m) and m.caption.eq(m.prompt).all() and m.seed.is_unique
    draw = "import torch; from diffusers import DiffusionPipeline; print(DiffusionPipeline.from_pretrained('models/mini_sd', dtype=torch.float32)('a bold zero', num_inference_steps=2).images[0].size)"
    assert '(8, 8)' in sh(['python', '-c', draw], clone)                  # the cached model is an ordinary pipeline
    out = sh('dvc repro --pull', clone)
    assert ran(out) == set() and 'up to date' in out
    assert sh('git status --porcelain', clone) == ''

def test_sigkill_at_any_moment_then_repro_finishes(repo):
    "From nothing, with seven kills of dvc alone, as a person or an OOM killer does it: its children must end by themselves, and tables, notebooks and sets are those of an uninterrupted run."
    want = tables(repo)
    same = {f: (repo/f).read_bytes() for f in ('results/headline.json', 'runs/classify/real.ipynb', 'runs/laws/laws.ipynb', 'sets/typeset/manifest.parquet', 'sets/names_g2/manifest.parquet')}
    sh('rm -rf build runs sets models judges results figures .dvc/cache/runs dvc.lock', repo)
    rng = random.Random(0)
    for k in range(7):
        p = subprocess.Popen([sys.executable, '-m', 'dvc', 'repro', '--no-run-cache'], cwd=repo, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(rng.uniform(3, 22))
        tree = psutil.Process(p.pid).children(recursive=True) if p.poll() is None else []
        before = len(list((repo/'build').glob('points/*/*.json')))
        p.kill(); p.wait()
        _, alive = psutil.wait_procs(tree, timeout=15)
        assert not [a for a in alive if a.is_running() and a.status() != psutil.STATUS_ZOMBIE], 'somebody outlived the run'
        assert len(list((repo/'build').glob('points/*/*.json'))) >= before
        for f in (repo/'build').glob('points/*/*.json'): json.loads(f.read_text())
    assert 'report' in ran(sh('dvc repro --no-run-cache', repo))
    assert tables(repo) == want
    for f, data in same.items(): assert (repo/f).read_bytes() == data, f

def test_a_killed_worker_stops_the_stage_and_loses_nothing(repo):
    want = tables(repo)
    sh('rm -rf build/points runs/classify', repo)
    edit(repo, lambda p: p['recipes']['convnext_digits'].update(samples_at_100=6400))
    p = subprocess.Popen([sys.executable, '-m', 'synthscale.run', 'classify', '-p', 'curve', 'typeset', '-p', 'workers', '2'], cwd=repo, env=environment(), stderr=subprocess.PIPE, text=True)
    deadline = time.time()+90
    def points(): return list((repo/'build').glob('points/*/*.json'))
    while not points() and time.time() < deadline: time.sleep(.1)
    workers = [c for c in psutil.Process(p.pid).children(recursive=True) if 'loky' in ' '.join(c.cmdline()) and 'resource_tracker' not in ' '.join(c.cmdline())]
    assert workers
    workers[0].kill()
    err = p.communicate(timeout=120)[1]
    done = len(points())
    assert p.returncode in (0, 1) and done >= 1
    if p.returncode: assert 'synthscale: ' in err
    sh(['synthscale', 'classify', '-p', 'curve', 'typeset'], repo)
    assert (repo/'runs'/'classify'/'typeset'/'curve.csv').exists()

# ---- bad input, through the pipeline

def test_an_unknown_key_stops_before_anything_runs(repo):
    edit(repo, lambda p: p['recipes']['convnext_digits'].update(learning_rate=.1))
    out = fails(repo)
    assert ran(out) == {'strip'} and "unknown key 'recipes.convnext_digits.learning_rate'" in out

def test_a_source_that_does_not_exist(repo):
    edit(repo, lambda p: p['classify']['curves']['typeset'].update(synthetic='typesett', real='typesett'))
    out = fails(repo)
    assert 'typesett' in out
    assert "did you mean 'typeset'" in sh(['synthscale', 'strip'], repo, ok=False)

def test_more_images_than_the_set_holds(repo):
    edit(repo, lambda p: p['classify']['curves']['real'].update(n_real=[20, 40, 5000]))
    out = fails(repo)
    assert 'classify.curves.real.n_real: set' in out and '5000 were asked for' in out

def test_a_flipped_byte_in_a_shard_is_named_and_mended(repo):
    shard = next((repo/'sets'/'names_g2').glob('*.tar.gz'))
    good = shard.read_bytes()
    bad = bytearray(good); bad[len(bad)//2] ^= 1
    os.chmod(shard, 0o644); shard.unlink(); shard.write_bytes(bad)
    assert f'{shard.name}: the shard is damaged' in sh(['synthscale', 'quality', '-p', 'source', 'names_g2'], repo, ok=False)
    sh('dvc repro', repo)                                                  # DVC sees the damage too, and brings the set back
    assert shard.read_bytes() == good

def test_a_missing_row_is_named(repo):
    f = repo/'runs'/'classify'/'real'/'curve.csv'
    df = pd.read_csv(f); f.unlink()
    df.drop(index=5).to_csv(f, index=False)
    out = sh(['synthscale', 'results'], repo, ok=False)
    assert '1 of ' in out and 'rows are missing' in out and "'curve': 'real'" in out
    shutil.rmtree(f.parent)
    assert "real/curve.csv: no such file; 'dvc repro classify@real' makes it" in sh(['synthscale', 'results'], repo, ok=False)

def test_a_class_missing_from_a_source(repo, tmp_path):
    own_study(repo, tmp_path)
    shutil.rmtree(tmp_path/'images'/'photos'/'train'/'dog')
    assert "split 'train': no image of class 'dog': the class is missing from this source" in sh(['synthscale', 'data', '-p', 'name', 'photos'], repo, ok=False)

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
                for i in range(n): Image.fromarray(rng.integers(shade-50, shade+50, (16, 16, 3), np.uint8)).save(d/f'{i:03d}.png')
    def change(p):
        p['study'] = dict(name='mine', seed=1, classes=['cat', 'dog'])
        p['data'] |= dict(image_size=12, channels=3)
        p['data']['sets'] = {k: dict(kind='imagefolder', input=str(tmp_path/'images'/k)) for k in ('photos', 'generated')}
        p['models'], p['prompts'], p['generate'] = {}, dict(sets={}), dict(load(ROOT/'params.yaml')['generate'], sources={})
        p['filters'], p['unions'] = {}, {}
        p['judges'] = dict(judge_real=dict(set='photos', n_images=20, recipe='convnext_digits'), judge_concept=dict(set='generated', n_images=20, recipe='convnext_digits'))
        p['quality']['sources'] = dict(generated=dict(set='generated', n_images=20))
        p['classify']['eval'] |= dict(set='photos', validation='val', tests=['test'], shift_set='photos')
        p['classify']['curves'] = dict(photos=dict(recipe='convnext_digits', real='photos', synthetic='photos', n_real=[8, 16, 32], n_synthetic=[0], seeds=2),
                                       generated=dict(recipe='convnext_digits', real='photos', synthetic='generated', n_real=[0, 8], n_synthetic=[16, 40], seeds=2))
        p['laws'] = dict(fit_range=dict(photos=[8, 32]))
        p['report'] = dict(scaling=['photos', 'generated'], samples=['photos'])
    edit(repo, change)
    sh(['synthscale', 'strip'], repo)

def test_classify_on_your_own_image_folders(repo, tmp_path):
    own_study(repo, tmp_path)
    for s in ('photos', 'generated'): sh(['synthscale', 'data', '-p', 'name', s], repo)
    sh(['synthscale', 'classify', '-p', 'curve', 'generated', '-p', 'workers', '1'], repo)
    df = pd.read_csv(repo/'runs'/'classify'/'generated'/'curve.csv')
    assert set(df.source) == {'generated', 'photos+generated'} and set(df.test_set) == {'val', 'test'}
    assert df[(df.metric == 'top1')].value.mean() > .8

def test_classify_on_your_own_shards(repo, tmp_path):
    own_study(repo, tmp_path)
    sh(['synthscale', 'data', '-p', 'name', 'photos'], repo)
    m = pd.read_parquet(repo/'sets'/'photos'/'manifest.parquet')
    (tmp_path/'shards').mkdir(); shutil.copytree(repo/'sets'/'photos', tmp_path/'shards'/'train')
    edit(repo, lambda p: p['data']['sets'].update(generated=dict(kind='webdataset', input=str(tmp_path/'shards'))))
    sh(['synthscale', 'data', '-p', 'name', 'generated'], repo)
    assert len(pd.read_parquet(repo/'sets'/'generated'/'manifest.parquet')) == len(m)
    out = sh(['synthscale', 'classify', '-p', 'curve', 'generated', '-p', 'workers', '1'], repo, ok=False)
    assert 'training images are also test images' in out                  # the shards held the test split too: a leak, and named

# ---- DVC across commits

def test_metrics_plots_and_experiments_across_commits(repo):
    sh('git tag before', repo)
    out = sh('dvc exp run -S classify.curves.real.seeds=3 -n third 2>&1', repo)
    assert {'classify@real', 'report'} <= ran(out) and 'classify@typeset' not in ran(out)
    sh('git add -A && git commit -qm third', repo)
    diff = json.loads(sh('dvc metrics diff before --json', repo))
    assert any('k.real.test.k' in k for f in diff.get('diff', diff).values() for k in f.get('data', f))
    page = sh('dvc plots diff before', repo)
    html = (repo/'dvc_plots'/'index.html').read_text()
    assert 'file://' in page and 'test_set' in html and html.count('typeset') > 4
    assert 'before' in html and 'workspace' in html
    assert 'third' in sh('dvc exp show --csv -A', repo)
    shown = sh('dvc params diff before', repo)
    assert 'classify.curves.real.seeds' in shown and '3' in shown

def test_an_experiment_in_a_temporary_copy_runs_the_copys_code(repo):
    out = sh('dvc exp run --temp -S laws.fit_range.real=[20,40] -n temp', repo)
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
        "one seed, and no generator: without sources there is no stage that draws"
        p['models'], p['generate']['sources'], p['filters'], p['unions'], p['prompts']['sets'] = {}, {}, {}, {}, {}
        p['classify']['curves'] = {k: p['classify']['curves'][k] | {'seeds': 1} for k in ('real', 'typeset')}
        p['quality']['sources'] = {'real': p['quality']['sources']['real']}
        p['laws'] |= dict(fit_range=dict(real=[20, 80], typeset=[20, 80]), compare=[['real', 'typeset']], choices={})
        p['report'] |= dict(scaling=['real', 'typeset'], mixing=[], grids=[], samples=['digits'])
    edit(d, less)
    out = sh('dvc repro', d)
    assert {'data@digits', 'classify@real', 'report'} <= ran(out) and not [s for s in ran(out) if s.startswith(('models', 'generate'))]
    assert set(pd.read_csv(d/'results'/'curves.csv').study) == {'mine'}
    sh('dvc push -q && git add -A && git commit -qm mine', d)
    assert ran(sh('dvc repro', repo)) == set()
    sh('dvc pull', repo)
    (d/'params.yaml').write_text('broken: [')
    assert ran(sh('dvc repro', repo)) == set()                            # a broken study does not stop the root

def test_push_and_pull_over_webdav(repo):
    "A real WebDAV server on loopback."
    pytest.importorskip('wsgidav', reason='wsgidav (dev requirement) is not installed')
    store = repo.parent/'store'; (store/'dvc').mkdir(parents=True)
    code = ("import sys\nfrom cheroot import wsgi\nfrom wsgidav.wsgidav_app import WsgiDAVApp\n"
            "s = wsgi.Server(('127.0.0.1', 0), WsgiDAVApp({'provider_mapping': {'/': sys.argv[1]}, 'simple_dc': {'user_mapping': {'*': True}}, 'verbose': 0, 'logging': {'enable': False}}))\n"
            "s.prepare(); print(s.bind_addr[1], flush=True); s.serve()")
    server = subprocess.Popen([sys.executable, '-c', code, str(store)], stdout=subprocess.PIPE, text=True)
    try:
        port = int(server.stdout.readline())
        sh(f'dvc remote add -q web webdav://127.0.0.1:{port}/dvc && dvc push -q -r web', repo)
        assert len(list(store.rglob('*'))) > 20
        sh('git add -A && git commit -qm web && git clone -q . ../clone', repo)
        clone = repo.parent/'clone'
        sh('rm -rf remote && dvc pull -q -r web', clone)
        assert (clone/'sets'/'typeset'/'manifest.parquet').read_bytes() == (repo/'sets'/'typeset'/'manifest.parquet').read_bytes()
        assert ran(sh('dvc repro', clone)) == set()
    finally:
        server.kill(); server.wait()
