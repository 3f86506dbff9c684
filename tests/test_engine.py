"Generating: the same bytes whatever happens, every family of model, models of a hub, nothing lost or silent."
import hashlib, json, shutil, subprocess, sys, threading, time
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
import numpy as np, pandas as pd, psutil, pytest, torch
from conftest import ROOT, WAIT, copy_repo, dump, environment, load, sh
from hypothesis import given, settings, strategies as st
from synthscale.shards import check_set, load_set, read_manifest, read_shard, replace_folder, write_manifest
from synthscale.filters import difference_hash, filter_set, pixel_hash, repeats
from synthscale.generate import (Source, assemble, sample_batch, images_there, recipe_differs, shard_is_whole,
                                 verify_source)
from synthscale.models import build_model, model_parts, training_threads
from synthscale.params import check_study
from synthscale.pipelines import FAMILIES, Sampler, sampling_settings, folder_sha256, load_pipeline, pipeline_class
from synthscale.run import main
from synthscale.smoke import run_smoke, smoke_inputs, smoke_params
from synthscale.study import Study, StudyError, derive_seed
from synthscale.random_pipelines import TINY, if_checker, sd_checker, tiny_amused, tiny_if, tiny_if_sr, tiny_sd
from synthscale.workers import generate_shards, generate_source, repair_source

torch.set_num_threads(1)
NAME = 'names_g2'

def small(folder, **source):
    "A study of one source: 5 shards of 3 batches, the last ones shorter."
    p = smoke_params()
    p['data'].update(shard_size=30)
    one = p['generate']['sources'][NAME] | dict(n_images=140, curve={}) | source
    p['generate'].update(batch_size=12, sources={NAME: one})
    p['filters'], p['merged'], p['quality']['sets'], p['laws'], p['report'] = {}, {}, {}, {}, {}
    p['classify'] |= dict(curves={'digits': p['classify']['curves']['digits']}, mixtures={})
    folder.mkdir(parents=True, exist_ok=True)
    dump(p, folder/'params.yaml')
    if not (folder/'data').exists():
        (folder/'data').symlink_to(smoke_inputs())
    return Study(folder)

@pytest.fixture(scope='module')
def generated(tmp_path_factory):
    "The study, its model made and its source generated in one go."
    s = small(tmp_path_factory.mktemp('engine')/'study')
    run_smoke(s, ('data', 'models', 'prompts'))
    generate_source(s, NAME, workers=1)
    return s

@pytest.fixture
def study(generated, tmp_path):
    "A copy of it with nothing generated; what was generated in one go is `study.whole`."
    shutil.copytree(generated.dir, tmp_path/'study', symlinks=True, ignore=shutil.ignore_patterns('build'))
    s = Study(tmp_path/'study')
    s.whole = files(s)
    shutil.rmtree(s.set_dir(NAME))
    return s

def files(s, name=NAME):
    return {p.name: p.read_bytes() for p in sorted(s.set_dir(name).iterdir())}

def change(s, **source):
    "The same study with other wishes for its source."
    p = load(s.dir/'params.yaml')
    p['generate']['sources'][NAME].update(source)
    dump(p, s.dir/'params.yaml')
    return Study(s.dir)

def start(*args, cwd, stderr=subprocess.PIPE):
    "Start this interpreter on this repository's package; its output is kept."
    env = environment() | {'PYTHONPATH': str(ROOT)}
    return subprocess.Popen([sys.executable, *args], cwd=cwd, env=env, stdout=subprocess.PIPE, stderr=stderr, text=True)

def watched(monkeypatch):
    "A list of the keys of all images that are sampled from now on."
    generated, real = [], sample_batch
    def watch(sampler, rows, retry):
        generated.extend(rows.key)
        return real(sampler, rows, retry)
    monkeypatch.setattr('synthscale.generate.sample_batch', watch)
    return generated

# ---- the same bytes, whatever happens

KILLS = """
import os, random, shutil, signal, sys, time
sys.stderr = open(os.devnull, 'w')
import diffusers, transformers, torch       # imported once, before forking; not yet used, so no thread is lost
from diffusers import StableDiffusionPipeline
from synthscale.generate import Source, images_there
from synthscale.study import Study
from synthscale.workers import generate_source
torch.set_num_threads(1)
s = Study('.')
src = Source(s, 'names_g2')
rng, kills, done, seen = random.Random(0), 0, 0, set()

def files():
    return {p.name: p.read_bytes() for p in src.out.iterdir()}

def child():
    pid = os.fork()
    if pid == 0:
        generate_source(s, 'names_g2', workers=1)
        os._exit(0)
    return pid

began = time.time()
os.waitpid(child(), 0)
once = time.time()-began
whole = files()
shutil.rmtree(src.out)
while kills < 20:
    pid = child()
    time.sleep(rng.uniform(.1, .9)*once*.7)
    os.kill(pid, signal.SIGKILL)
    if os.WIFSIGNALED(os.waitpid(pid, 0)[1]):
        kills += 1
        seen.add(images_there(src, src.shards))
    if src.out.exists() and (src.out/'recipe.json').exists():
        done += 1
        assert files() == whole, 'other bytes after a kill'
        shutil.rmtree(src.out)
os.waitpid(child(), 0)
assert files() == whole, 'other bytes at the end'
print(kills, done, len(seen))
"""

def test_twenty_kills_at_random_moments_change_no_byte(study):
    p = start('-c', KILLS, cwd=study.dir)
    out, err = p.communicate(timeout=WAIT)
    assert p.returncode == 0, err[-2000:]
    kills, done, moments = map(int, out.split()[-3:])
    assert kills == 20 and moments >= 4, out          # they fell at different stages of the work
    assert files(study) == study.whole

@pytest.mark.slow
def test_one_two_and_four_workers_generate_the_same_bytes_and_a_killed_worker_is_replaced(study, ray_turn):
    "Four Ray workers; then two, one of which is killed in the middle of a shard."
    generate_source(study, NAME, workers=4)
    assert files(study) == study.whole
    study = change(study, steps=25)
    generate_source(study, NAME, workers=1)
    whole = files(study)
    src = Source(study, NAME)
    shutil.rmtree(study.set_dir(NAME))
    died = []
    def kill_one():
        while not died:
            if 12 <= images_there(src, src.shards) < 100:
                for p in psutil.Process().children(recursive=True):
                    try:
                        if p.name().startswith('ray::Worker') or 'ray::Worker' in ' '.join(p.cmdline()):
                            p.kill()
                            died.append(p.pid)
                            break
                    except psutil.Error:
                        pass
            time.sleep(.02)
    t = threading.Thread(target=kill_one, daemon=True)
    t.start()
    generate_source(study, NAME, workers=2)
    assert died and files(study) == whole

def test_shards_generated_by_the_members_of_an_array_make_the_same_set(study):
    "synthscale generate-shards --shards, two processes side by side; the stage finds everything generated."
    args = ['-m', 'synthscale.run', 'generate-shards', NAME, '--workers', '1', '--shards']
    a, b = (start(*args, r, cwd=study.dir, stderr=subprocess.DEVNULL) for r in ('0:2', '2:5'))
    outs = [p.communicate(timeout=WAIT)[0] for p in (a, b)]
    assert a.returncode == b.returncode == 0 and any("5 of 5 shards are made" in o for o in outs)
    src = Source(study, NAME)
    assert all(shard_is_whole(src, s) for s in src.shards)
    assemble(src)
    assert files(study) == study.whole

def test_a_larger_source_keeps_the_smaller_ones_bytes(study, monkeypatch):
    small_ = change(study, n_images=70)
    before = generate_source(small_, NAME, workers=1)
    old = files(small_)
    generated = watched(monkeypatch)
    after = generate_source(change(study, n_images=140), NAME, workers=1)
    assert files(study) == study.whole
    assert after.head(70).sha256.tolist() == before.sha256.tolist()
    for name in ('names_g2-000000.tar.gz', 'names_g2-000001.tar.gz'):
        assert files(study)[name] == old[name]
    # shards 0 and 1 are kept; of the third, whose first batch was not full, that batch is generated again
    assert min(generated) == 'train-0000060' and len(generated) == 80
    generate_source(change(study, n_images=70), NAME, workers=1)       # and back again
    assert files(study) == old and len(generated) == 80

def test_another_batch_size_changes_images_by_rounding_only(study):
    "The stated tolerance: one grey level of 255."
    src = Source(study, NAME)
    rows = src.rows(0)[:12]
    def by(n):
        "The twelve images, n in a batch."
        sampler = Sampler(src.model, src.how, src.texts, n)
        batches = [rows[i:i+n] for i in range(0, 12, n)]
        return np.concatenate([sampler.sample(b.prompt.tolist(), b.seed.tolist())[0] for b in batches])
    images = {n: by(n) for n in (1, 4, 12)}
    for n in (1, 4):
        assert np.abs(images[n].astype(int)-images[12]).max() <= 1

# ---- damage, and room on the disk

def test_verify_finds_what_is_damaged_and_repair_generates_only_that(study, monkeypatch, capsys):
    generate_source(study, NAME, workers=1)
    d, generated = study.set_dir(NAME), watched(monkeypatch)
    def put(name, data):
        (d/name).unlink()
        (d/name).write_bytes(data)
    (d/'names_g2-000000.tar.gz').unlink()
    put('names_g2-000002.tar.gz', study.whole['names_g2-000002.tar.gz'][:-50])
    put('names_g2-000004.tar.gz', study.whole['names_g2-000004.tar.gz'].replace(b'\x00', b'\x01', 1))
    assert main(['verify', NAME, '--study', str(study.dir)]) == 1
    assert capsys.readouterr().out.count('truncated or altered') == 2
    found = repair_source(study, NAME, workers=1)
    assert found.problem.tolist() == ['missing', '', 'truncated or altered', '', 'truncated or altered']
    assert {int(k[6:])//30 for k in generated} == {0, 2, 4}
    assert files(study) == study.whole
    assert main(['verify', '--study', str(study.dir)]) == 0 and '5 shards, 0 of them damaged' in capsys.readouterr().out

def test_a_shard_that_does_not_come_out_as_it_was_is_not_put_in_place(study, monkeypatch):
    generate_source(study, NAME, workers=1)
    (study.set_dir(NAME)/'names_g2-000001.tar.gz').unlink()
    def rounds_differently(*a):
        images, *rest = sample_batch(*a)
        return images ^ 1, *rest
    with monkeypatch.context() as m:
        m.setattr('synthscale.generate.sample_batch', rounds_differently)      # another machine
        for again in (repair_source, generate_source):
            with pytest.raises(StudyError, match='30 images are not those of the manifest: another machine'):
                again(study, NAME, workers=1)
            assert {p.name for p in study.set_dir(NAME).iterdir()} == {*study.whole} - {'names_g2-000001.tar.gz'}
    generate_source(study, NAME, workers=1)                              # the first machine again
    assert files(study) == study.whole

def test_the_origin_of_a_prompt_is_in_its_row_and_draws_no_image_again(study):
    "What a prompt was made of is no part of what it asks for."
    before = Source(study, 'names_g2').recipe['prompts']
    path = study.path('runs', 'prompts', 'names.csv')
    t = pd.read_csv(path, keep_default_na=False)
    assert (t.origin == 'template: {name}').all()
    t.assign(origin='somewhere else').to_csv(path, index=False)
    assert Source(study, 'names_g2').recipe['prompts'] == before
    t.assign(prompt='x '+t.prompt).to_csv(path, index=False)
    assert Source(study, 'names_g2').recipe['prompts'] != before

def test_a_set_of_another_recipe_is_not_taken_for_damaged(study, capsys):
    generate_source(study, NAME, workers=1)
    other = change(study, guidance_scale=4.)
    found = verify_source(other, NAME)
    assert found.problem.eq('').all() and found.asked.eq('sampling.guidance_scale').all()
    assert main(['verify', '--study', str(study.dir)]) == 0
    assert "asks for something else than is there (it differs in sampling.guidance_scale)" in capsys.readouterr().out
    repair_source(other, NAME, workers=1)                                # nothing is damaged
    assert files(study) == study.whole
    (study.set_dir(NAME)/'names_g2-000001.tar.gz').unlink()
    assert verify_source(other, NAME).problem.tolist() == ['', 'missing', '', '', '']
    with pytest.raises(StudyError, match='cannot be generated as they were.*dvc pull generate@names_g2'):
        repair_source(other, NAME, workers=1)
    generate_source(other, NAME, workers=1)
    assert 'is generated again; what differs: sampling.guidance_scale' in capsys.readouterr().err
    assert read_manifest(other.set_dir(NAME)).guidance_scale.eq(4).all()

def swap(m, column):
    "Two values of a column exchanged."
    v = m[column].tolist()
    v[0], v[1] = v[1], v[0]
    return m.assign(**{column: v})

def put(column, value, rows=slice(0, 1)):
    "A damage that sets some values of a column."
    def damage(m):
        v = m[column].astype(object)
        v[rows] = value
        return m.assign(**{column: v.infer_objects()})
    return damage

# what plan, recipe and shard decide: mended without an image being generated
DECIDED = {
    'labels swapped': lambda m: swap(m, 'label'), 'classes swapped': lambda m: swap(m, 'class'),
    'labels and classes swapped': lambda m: swap(swap(m, 'label'), 'class'), 'label 99': put('label', 99),
    'label of a float': lambda m: m.assign(label=m.label.astype(float)),
    'guidance': put('guidance_scale', 7.5, slice(0, 140)),
    'guidance of one': put('guidance_scale', 7.5), 'steps': put('steps', 99), 'scheduler': put('scheduler', 'X'),
    'model': put('model', 'mini_if'), 'model_sha256': put('model_sha256', '0'*64), 'revision': put('revision', 'main'),
    'caption': put('caption', 'a one'), 'prompt': put('prompt', 'a one'),
    'prompts swapped': lambda m: swap(m, 'prompt'),
    'seed': put('seed', 1), 'attempts': put('attempts', 2), 'split': put('split', 'test'),
    'key': put('key', 'train-9999999'),
    'image hashes swapped': lambda m: swap(m, 'sha256'), 'an image hash': put('sha256', '0'*64),
    'a shard hash': put('shard_sha256', '0'*64), 'shard of a row': put('shard', 'names_g2-000001.tar.gz'),
    'shard that is not': put('shard', 'x.tar.gz'), 'a row dropped': lambda m: m.drop(5),
    'the last row': lambda m: m[:-1],
    'rows reversed': lambda m: m[::-1], 'two rows exchanged': lambda m: m.iloc[[1, 0, *range(2, 140)]],
    'shards exchanged': lambda m: pd.concat([m[30:60], m[:30], m[60:]]), 'a row twice': lambda m: pd.concat([m[:1], m]),
    'another column': lambda m: m.assign(note='x'), 'columns exchanged': lambda m: m[m.columns[::-1]],
    'half of a shard dropped': lambda m: m.drop(range(12, 24)), 'device of a row missing': put('device', None)}
# what only the rows say: its batch is generated again
UNDECIDED = {
    'device of a row': put('device', 'other'), 'libraries of a row': put('libraries', 'torch 1'),
    'cut of a row': put('truncated', True), 'a column dropped': lambda m: m.drop(columns='label'),
    'every shard hash': put('shard_sha256', '0'*64, slice(0, 140)), 'no row': lambda m: m[:0],
    'a shard dropped': lambda m: m[30:]}

@pytest.mark.parametrize('decided', [True, False])
def test_a_manifest_that_is_not_what_plan_recipe_and_shards_say_is_named_and_mended(study, monkeypatch, decided):
    "F1: verify names it, the stage mends it to the same bytes, and draws nothing that need not be drawn."
    generate_source(study, NAME, workers=1)
    file = study.set_dir(NAME)/'manifest.parquet'
    m, generated = pd.read_parquet(file), watched(monkeypatch)
    for what, damage in (DECIDED if decided else UNDECIDED).items():
        file.unlink()
        damage(m.copy()).to_parquet(file, index=False)
        found = verify_source(study, NAME)
        assert found.problem.ne('').any(), what
        assert found.asked.eq('').all() or decided is False, what
        generated.clear()
        generate_source(study, NAME, workers=1)
        assert files(study) == study.whole, what
        assert not (decided and what != 'device of a row missing' and generated), (what, generated)
        assert len(generated) <= 140 and verify_source(study, NAME).problem.eq('').all(), what

def test_verify_names_column_and_image_and_repair_mends(study, capsys):
    generate_source(study, NAME, workers=1)
    file = study.set_dir(NAME)/'manifest.parquet'
    swap(pd.read_parquet(file), 'label').to_parquet(file, index=False)
    assert main(['verify', NAME, '--study', str(study.dir)]) == 1
    assert 'manifest: label of train-0000000 and 1 more' in capsys.readouterr().out
    assert main(['verify', NAME, '--repair', '--workers', '1', '--study', str(study.dir)]) == 0
    assert files(study) == study.whole
    file.unlink()
    file.write_bytes(b'')
    assert main(['verify', NAME, '--study', str(study.dir)]) == 1
    assert 'manifest: missing or not readable' in capsys.readouterr().out

def test_rows_of_a_finished_shard_that_is_no_set_yet_are_compared_too(study, monkeypatch):
    src = Source(study, NAME)
    generate_shards(src, [0], 1)
    generated = watched(monkeypatch)
    put('label', 99)(pd.read_parquet(src.table(0))).to_parquet(src.table(0), index=False)
    assert not shard_is_whole(src, 0)
    generate_source(study, NAME, workers=1)
    assert files(study) == study.whole and not {k for k in generated if k < 'train-0000030'}

def test_a_model_that_is_not_the_recorded_one_is_refused(study, monkeypatch):
    "F9: by generate, generate-shards, verify and plan alike, before an image is generated."
    folder, generated = study.path('models', 'mini_sd'), watched(monkeypatch)
    weights = folder/'unet'/'diffusion_pytorch_model.safetensors'
    good = weights.read_bytes()
    def put_file(path, data):
        path.unlink(missing_ok=True)
        path.write_bytes(data)
    flipped = good[:-9]+bytes([good[-9] ^ 1])+good[-8:]
    config = folder/'scheduler'/'scheduler_config.json'
    settings_ = config.read_bytes()
    for path, bad, whole in ((weights, flipped, good), (config, settings_+b' ', settings_),
                             (folder/'unet'/'more.json', b'{}', None)):
        put_file(path, bad)
        for command in (lambda: generate_source(study, NAME, workers=1), lambda: Source(study, NAME)):
            with pytest.raises(StudyError, match=f'{path.name} is .*the one that was recorded'):
                command()
        assert main(['generate-shards', NAME, '--workers', '1', '--study', str(study.dir)]) != 0
        path.unlink()
        if whole is not None:
            put_file(path, whole)
    assert not generated
    generate_source(study, NAME, workers=1)
    assert files(study) == study.whole

@pytest.mark.parametrize('moment', ['between the renames', 'after them'])
def test_a_kill_while_the_set_is_put_in_place_loses_nothing(study, monkeypatch, moment):
    generate_source(change(study, n_images=70), NAME, workers=1)
    larger = change(study, n_images=140)
    def killed(new, folder):
        if moment == 'after them':
            replace_folder(new, folder)
        else:
            Path(folder).rename(Path(folder).with_name('.old'))
        raise KeyboardInterrupt
    with monkeypatch.context() as m:
        m.setattr('synthscale.generate.replace_folder', killed)
        with pytest.raises(KeyboardInterrupt):
            generate_source(larger, NAME, workers=1)
    monkeypatch.setattr('synthscale.generate.sample_batch', None)              # nothing is generated any more
    generate_source(larger, NAME, workers=1)
    assert files(study) == study.whole

def test_two_runs_that_finish_at_once_make_one_whole_set(study, monkeypatch):
    "Both have generated everything and put the set together; one is held up in the middle of it."
    src, real, held = Source(study, NAME), check_set, threading.Event()
    generate_shards(src, None, 1)
    def slow(*a):
        held.set()
        time.sleep(.5)
        real(*a)
    monkeypatch.setattr('synthscale.generate.check_set', slow)
    out = []
    a = threading.Thread(target=lambda: out.append(assemble(src)))
    a.start()
    held.wait()
    out.append(assemble(Source(study, NAME)))
    a.join()
    assert len(out) == 2 and out[0].equals(out[1]) and files(study) == study.whole

@pytest.fixture
def tight(study):
    "The study's build folder on a real tmpfs of 64 kB; `tight(kB)` makes it larger."
    build = study.dir/'build'
    build.mkdir(exist_ok=True)
    def mount(*a):
        return subprocess.run(['mount', '-t', 'tmpfs', *a, 'none', str(build)], capture_output=True)
    if mount('-o', 'size=64k').returncode:
        pytest.skip('a tmpfs cannot be mounted here (needs root)')
    yield lambda kB: mount('-o', f'remount,size={kB}k')
    subprocess.run(['umount', '-l', str(build)], check=True)

def test_a_full_disk_is_named_and_loses_nothing(study, tight):
    src = Source(study, NAME)
    with pytest.raises(StudyError, match='no space left on the device; free some and run again'):
        generate_shards(src, None, 1)
    some = images_there(src, src.shards)
    assert 0 < some < src.n and not list(src.folder.rglob('*.tmp'))       # what was finished is there, and no half file
    assert all(shard_is_whole(src, s) for s in src.shards if src.table(s).exists())
    tight(50000)
    m = generate_source(study, NAME, workers=1)
    assert files(study) == study.whole and len(m) == src.n

def test_a_shard_that_another_run_generates_is_left_for_last_and_waited_for(study, capsys):
    src, order = Source(study, NAME), []
    held = src.lock(0)
    held.acquire()
    t = threading.Thread(target=lambda: order.append(generate_shards(src, [0, 1], 1)))
    t.start()
    while not src.table(1).exists():
        time.sleep(.01)
    time.sleep(.3)
    assert t.is_alive() and not src.table(0).exists()                    # it waits, and has generated the other shard
    held.release()
    t.join(60)
    assert order == [None] and all(shard_is_whole(src, s) for s in (0, 1))
    said = "shard 0 of source 'names_g2' is being generated by another run: left for last"
    assert said in capsys.readouterr().err

FULL = """
import sys
from synthscale.study import Study
from synthscale.workers import generate_source
print(len(generate_source(Study('.'), 'names_g2', workers=int(sys.argv[1]))))
"""

@pytest.mark.slow
@pytest.mark.parametrize('workers', [(1, 1), (2, 1)])
def test_two_whole_runs_on_the_same_source_share_the_work(study, workers, ray_turn):
    "Started at once, without Ray or one of them with it: both end well, and there is one whole set."
    study = change(study, steps=12)
    whole = generate_source(study, NAME, workers=1).sha256.tolist()
    shutil.rmtree(study.set_dir(NAME))
    both = [start('-c', FULL, str(n), cwd=study.dir) for n in workers]
    outs = [p.communicate(timeout=WAIT) for p in both]
    assert [p.returncode for p in both] == [0, 0], outs
    assert [o[0].strip() for o in outs] == ['140', '140']
    assert read_manifest(study.set_dir(NAME)).sha256.tolist() == whole
    assert verify_source(study, NAME).problem.eq('').all()
    assert not list(study.path('build', 'generate').glob(f'{NAME}-*'))

def test_a_cluster_that_is_not_there_is_named(study):
    with pytest.raises(StudyError, match="Ray at 'nonsense' does not start"):
        generate_shards(Source(study, NAME), None, 2, 'nonsense')

def test_a_newer_library_keeps_what_was_generated(study, monkeypatch):
    "A source that is enlarged after an upgrade: the old bytes stay, and every row says what generated it."
    before = generate_source(change(study, n_images=60), NAME, workers=1)
    monkeypatch.setattr('synthscale.generate.libraries', lambda: 'torch 99')
    after = generate_source(change(study, n_images=140), NAME, workers=1)
    for column in ('sha256', 'libraries'):
        assert after.head(60)[column].tolist() == before[column].tolist()
    assert after.libraries[60:].eq('torch 99').all() and 'diffusers' in before.libraries[0]
    monkeypatch.setattr('synthscale.generate.ENGINE', 99)                # a change of this code that changes images
    assert verify_source(study, NAME).asked.eq('engine').all()

# ---- prompts, classes, numbers

def test_odd_prompts_are_generated_from_and_what_was_cut_is_recorded(study):
    p = load(study.dir/'params.yaml')
    texts = ['a zero', 'one '*1000, '🦄🦄🦄']
    by_class = {c: [texts[i % 3]] for i, c in enumerate(p['study']['classes'])}
    p['prompts'] = dict(sets=dict(names=dict(by_class=by_class)))
    dump(p, study.dir/'params.yaml')
    s = Study(study.dir)
    run_smoke(s, ('prompts',))
    m = generate_source(s, NAME, workers=1)
    cut = m.groupby('prompt').truncated.unique().map(list).to_dict()
    assert cut == {'a zero': [False], ' '.join(['one']*1000): [True], '🦄🦄🦄': [False]}
    assert load_set(s.set_dir(NAME)).images.std() > 1

@pytest.mark.parametrize('name', ['../../etc', 'a/b', '..', '', 'x\0'])
def test_a_class_name_cannot_leave_its_folder(name):
    p = smoke_params()
    p['study']['classes'][0] = name
    with pytest.raises(StudyError, match='study.classes'):
        check_study(Study('.', p))

def test_an_image_that_is_not_finite_is_named_by_its_seed(study):
    from safetensors.torch import load_file, save_file
    f = study.dir/'models'/'mini_sd'/'unet'/'diffusion_pytorch_model.safetensors'
    w = load_file(f)
    key = next(k for k in w if k.endswith('conv_out.weight'))
    w[key] = torch.full_like(w[key], float('nan'))
    f.unlink()
    save_file(w, f, metadata={'format': 'pt'})
    study.path('runs', 'models', 'mini_sd.json').unlink()            # nothing was noted of this model
    src = Source(study, NAME)
    with pytest.raises(StudyError, match='numbers that are not finite') as e:
        generate_source(study, NAME, workers=1)
    assert f"seed {src.rows(0).seed[0]}" in str(e.value)
    assert '1 of 5 shards failed' in str(e.value)                    # the others would fail as well, and are not tried
    assert images_there(src, src.shards) == 0

# ---- every family, on real classes

ASK = dict(guidance_scale=2., steps=3, scheduler='', size=None, safety_checker=False, upscale=None)
ENGINE = SimpleNamespace(dtype='float32', channels_last=False, compile='no')
WORDS = ['zero', 'one two', 'a photo of the digit three', 'red']

def ask(**kw):
    return SimpleNamespace(**ASK | kw)

@pytest.mark.parametrize('family', [f for f in TINY if f != 'if_sr'])
@pytest.mark.parametrize('guidance', [1., 3.])
def test_every_family_generates_what_diffusers_generates_and_rows_are_independent(tmp_path, family, guidance):
    folder = TINY[family](tmp_path/family)
    size = 16 if family == 'flux' else None                  # its own default is 1024, whatever its networks are
    how = sampling_settings(folder, ENGINE, ask(guidance_scale=guidance, size=size))
    assert how.pipeline in FAMILIES
    p = Sampler(folder, how, WORDS, 4)
    images, _, finite = p.sample(WORDS, [1, 2, 3, 4])
    assert finite.all() and images.std() > 0 and len({a.tobytes() for a in images}) == 4
    order = [2, 0, 3, 1]
    assert (p.sample([WORDS[i] for i in order], [i+1 for i in order])[0] == images[order]).all()
    assert (p.sample(WORDS[1:2], [2])[0][0] == images[1]).all()
    alone = Sampler(folder, how, WORDS, 1).sample(WORDS[1:2], [2])[0][0]
    assert np.abs(alone.astype(int)-images[1]).max() <= 1
    generators = [torch.Generator().manual_seed(i) for i in (1, 2, 3, 4)]
    own = {}
    if family.startswith('pixart') or family == 'if':
        own['clean_caption'] = False
    if family.startswith('pixart'):
        own['use_resolution_binning'] = False
    again = p.pipe(WORDS, guidance_scale=guidance, num_inference_steps=3, generator=generators, output_type='np',
                   height=size, width=size, **own).images
    assert np.abs((again*255).round()-images).max() <= 1

@pytest.mark.parametrize('family', [f for f in TINY if f != 'if_sr'])
def test_every_family_generates_in_half_precision_with_another_size_or_scheduler(tmp_path, family):
    folder = TINY[family](tmp_path/family)
    other = dict(
        sd=dict(scheduler='DDIMScheduler'), sdxl=dict(scheduler='EulerAncestralDiscreteScheduler', size=32),
        flux=dict(size=16), pixart_alpha=dict(scheduler='DPMSolverSinglestepScheduler'), pixart_sigma=dict(size=16),
    ).get(family, {})
    how = sampling_settings(folder, SimpleNamespace(dtype='bfloat16', channels_last=True, compile='no'), ask(**other))
    p = Sampler(folder, how, WORDS, 4)
    images, _, finite = p.sample(WORDS, [1, 2, 3, 4])
    assert finite.all() and images.std() > 0 and (p.sample(WORDS[2:3], [3])[0][0] == images[2]).all()
    nets = [m for m in p.pipe.components.values() if isinstance(m, torch.nn.Module)]
    assert nets and all(m.dtype == torch.bfloat16 or getattr(m, '_keep_in_fp32_modules', None) for m in nets)
    if 'size' in other:
        assert images.shape[1:3] == (other['size'],)*2
    assert type(p.pipe.scheduler).__name__ in (how.scheduler, 'RowAmusedScheduler')

def test_a_scheduler_that_does_not_fit_is_refused(tmp_path):
    folder = tiny_sd(tmp_path/'m')
    for wrong in ('FlowMatchEulerDiscreteScheduler', 'AmusedScheduler'):
        words = f"{wrong}', which cannot take the place of the DPMSolverMultistepScheduler"
        with pytest.raises(StudyError, match=words):
            sampling_settings(folder, ENGINE, ask(scheduler=wrong))

def test_a_compiled_sampler_generates_the_same_but_for_rounding(tmp_path):
    "On a CPU, with weights as constants."
    folder = tiny_sd(tmp_path/'m')
    plain = Sampler(folder, sampling_settings(folder, ENGINE, ask()), WORDS, 4).sample(WORDS, [1, 2, 3, 4])[0]
    compiled = SimpleNamespace(dtype='float32', channels_last=True, compile='default')
    p = Sampler(folder, sampling_settings(folder, compiled, ask()), WORDS, 4)
    assert np.abs(p.sample(WORDS, [1, 2, 3, 4])[0].astype(int)-plain).max() <= 1
    assert p.sample(WORDS[:1], [1])[0].shape == plain[:1].shape      # filled up to the same size: not compiled again

@pytest.mark.parametrize('format', ['jpeg', 'webp'])
def test_images_are_stored_as_jpeg_or_webp_where_asked(study, format):
    p = load(study.dir/'params.yaml')
    p['data'].update(channels=3, image_size=64)
    p['generate'].update(format=format, quality=90, resize='lanczos')
    p['generate']['sources'][NAME].update(n_images=40)
    dump(p, study.dir/'params.yaml')
    s = Study(study.dir)
    m = generate_source(s, NAME, workers=1)
    images = load_set(s.set_dir(NAME)).images
    assert images.shape == (40, 64, 64, 3) and m.shard[0] == 'names_g2-000000.tar'
    import tarfile
    names = tarfile.open(s.set_dir(NAME)/m.shard[0]).getnames()
    assert {n.rsplit('.')[-1] for n in names} == {dict(jpeg='jpg').get(format, format), 'cls', 'txt'}

def test_a_cascade_of_two_stages_is_run_through_a_study(study):
    home = study.dir/'checkpoints'
    tiny_if(home/'if')
    tiny_if_sr(home/'if'/'two')
    p = load(study.dir/'params.yaml')
    p['data'].update(image_size=16, channels=3)
    p['models'] = dict(deep=dict(type='local', input='checkpoints/if', upscaler='checkpoints/if/two',
                                 pipeline='IFPipeline'))
    p['generate']['sources'][NAME].update(model='deep', guidance_scale=1.5, n_images=20,
                                          upscale=dict(steps=2, guidance_scale=2.))
    dump(p, study.dir/'params.yaml')
    s = Study(study.dir)
    folder = build_model(s, 'deep')
    assert (folder/'upscaler'/'unet').is_dir()
    m = generate_source(s, NAME, workers=1)
    src = Source(s, NAME)
    images = load_set(s.set_dir(NAME)).images
    assert images.shape == (20, 16, 16, 3) and m.scheduler.eq('DDPMScheduler').all()
    assert src.how.upscale == dict(guidance_scale=2., steps=2, noise_level=250)
    one, two = load_pipeline(src.model), load_pipeline(src.model/'upscaler', upscaler=True)   # diffusers' own two calls
    rows = src.rows(0)[:12]
    gens = [torch.Generator().manual_seed(int(s)) for s in rows.seed]
    e, n = one.encode_prompt(rows.prompt.tolist(), do_classifier_free_guidance=True, clean_caption=False)
    kw = dict(prompt_embeds=e, negative_prompt_embeds=n, generator=gens)
    first = one(**kw, guidance_scale=1.5, num_inference_steps=3, output_type='pt').images
    second = two(**kw, image=first, guidance_scale=2., num_inference_steps=2, noise_level=250, output_type='np').images
    assert np.abs((second*255).round()-images[:12]).max() <= 1

def test_a_pipeline_of_no_known_family_is_run_by_its_own_call(tmp_path):
    "Any text-to-image class will do; prompts are then given as they are."
    folder = tiny_sd(tmp_path/'m')
    index = json.loads((folder/'model_index.json').read_text())
    (folder/'model_index.json').write_text(json.dumps(index | {'_class_name': 'StableDiffusionPAGPipeline'}))
    how = sampling_settings(folder, ENGINE, ask())
    assert how.pipeline not in FAMILIES and how.steps == 3
    p = Sampler(folder, how, WORDS, 4)
    a = p.sample(WORDS, [1, 2, 3, 4])[0]
    assert (p.sample(WORDS[2:3], [3])[0][0] == a[2]).all()

def test_amused_logits_that_are_not_finite_are_named(tmp_path):
    folder = tiny_amused(tmp_path/'m')
    p = Sampler(folder, sampling_settings(folder, ENGINE, ask()), WORDS, 4)
    with torch.no_grad():
        next(w for n, w in p.pipe.transformer.named_parameters() if w.ndim > 1).fill_(float('nan'))
    assert not p.sample(WORDS, [1, 2, 3, 4])[2].any()

def test_an_infinite_image_is_named_and_not_stored_as_white(tmp_path):
    "The pipeline clips what its decoder returns, so that infinity would be white."
    folder = tiny_sd(tmp_path/'m')
    p = Sampler(folder, sampling_settings(folder, ENGINE, ask()), WORDS, 4)
    with torch.no_grad():
        p.pipe.vae.decoder.conv_out.bias[0] = float('inf')
    assert not p.sample(WORDS, [1, 2, 3, 4])[2].any()

@pytest.mark.parametrize('name, generated', [
    ('Flux2Pipeline', True), ('StableDiffusionPAGPipeline', True), ('StableDiffusionControlNetPipeline', False),
    ('FluxControlPipeline', False), ('StableDiffusionImg2ImgPipeline', False),
    ('StableDiffusionInpaintPipeline', False), ('WuerstchenCombinedPipeline', False),
    ('IFSuperResolutionPipeline', False), ('AnimateDiffPipeline', False)])
def test_which_classes_generate_images_from_text(tmp_path, name, generated):
    (tmp_path/'model_index.json').write_text(json.dumps({'_class_name': name}))
    if generated:
        assert pipeline_class(tmp_path)[0].__name__ == name
    else:
        with pytest.raises(StudyError, match='not a text-to-image pipeline'):
            pipeline_class(tmp_path)

def test_embeddings_that_do_not_fit_are_encoded_again_and_are_the_same(tmp_path, monkeypatch):
    folder, texts = tiny_sd(tmp_path/'m'), [f'red {i}' for i in range(100)]
    roomy = Sampler(folder, sampling_settings(folder, ENGINE, ask()), texts, 4)
    monkeypatch.setattr('synthscale.pipelines.KEEP', 0)
    tight = Sampler(folder, sampling_settings(folder, ENGINE, ask()), texts, 4)
    for some in ([0, 99, 50, 1], [98, 2, 51, 0]):
        a, b = (sampler.sample([texts[i] for i in some], some)[0] for sampler in (roomy, tight))
        assert (a == b).all()
    assert len(roomy.groups) == 3 and len(tight.groups) == 1

@pytest.mark.parametrize('make, checker', [(tiny_sd, sd_checker), (tiny_if, if_checker)])
def test_flagged_images_are_generated_again_from_their_next_seed(tmp_path, make, checker):
    "A real safety checker, its threshold between the scores that it gives."
    net, features = checker()
    how = sampling_settings(make(tmp_path/'plain'), ENGINE, ask(safety_checker=True))
    folder = make(tmp_path/'m', net, features)
    rows = pd.DataFrame({'class': 'x', 'key': [f'train-{i}' for i in range(12)],
                         'prompt': [WORDS[i % 4] for i in range(12)], 'seed': range(100, 112)})
    def retry(row, k):
        return WORDS[(WORDS.index(row.prompt)+k//8) % 4], derive_seed(0, 'generate', 's', row.key, 'again', k)
    free = Sampler(folder, how, WORDS, 12)
    unflagged = sample_batch(free, rows, retry)
    assert (unflagged[3] == 1).all()
    threshold(free, make)                                           # now about half of all images are flagged
    images, flags, _ = free.sample(rows.prompt.tolist(), rows.seed.tolist())
    assert 0 < flags.sum() < 12 and not images[flags].any()         # what a plain loop would store: black
    images, prompts, seeds, attempts = sample_batch(free, rows, retry)
    assert ((attempts > 1) == flags).all() and (seeds[~flags] == rows.seed[~flags]).all()
    assert all((prompts[i], seeds[i]) == retry(rows.iloc[i], int(attempts[i])-1) for i in np.flatnonzero(flags))
    assert (images[~flags] == unflagged[0][~flags]).all() and all(a.any() for a in images)
    assert (sample_batch(free, rows, retry)[0] == images).all()
    if make is tiny_if:                             # IF's checker blackens what it takes for a watermark, too
        free.pipe.safety_checker.p_head.bias.data[:], free.pipe.safety_checker.w_head.bias.data[:] = -99, 99
        assert free.sample(rows.prompt.tolist(), rows.seed.tolist())[1].all()
    threshold(free, make, all_=True)
    with pytest.raises(StudyError, match='train-0.*flagged 64 images in a row'):
        sample_batch(free, rows, retry)

def threshold(p, make, all_=False):
    "Set the checker of a sampler between the scores of the images that it generates."
    c = p.pipe.safety_checker
    scores = []
    if make is tiny_sd:
        if all_:
            c.concept_embeds_weights.data[:] = -2
            return
        from diffusers.pipelines.stable_diffusion.safety_checker import cosine_distance
        def keep(module, inputs, out):
            scores.append(cosine_distance(out, c.concept_embeds)[:, 0])
        hook = c.visual_projection.register_forward_hook(keep)
    else:
        if all_:
            c.p_head.bias.data[:] = 99
            return
        def keep(module, inputs, out):
            scores.append(out[:, 0]-module.bias[0])
        hook = c.p_head.register_forward_hook(keep)
    p.sample([WORDS[i % 4] for i in range(12)], range(100, 112))
    hook.remove()
    s = torch.cat(scores).sort().values
    i = int((s[4:9]-s[3:8]).argmax())+4                             # the widest gap near the middle
    middle = float((s[i-1]+s[i])/2)
    if make is tiny_sd:
        c.concept_embeds_weights.data[:1] = middle
    else:
        c.p_head.bias.data[:] = .5-middle

# ---- models from a hub: a small server with the hub's addresses, asked by the real huggingface_hub

COMMIT = '0123456789abcdef0123456789abcdef01234567'

class Hub(BaseHTTPRequestHandler):
    """The repositories lab/NAME in a folder, all at one commit; `asked` keeps every request, `broken` the files that
    break off in the middle, once; those of lab/broken always do."""
    def __init__(self, folder, asked, broken, *a):
        self.folder, self.asked, self.broken = folder, asked, broken
        super().__init__(*a)

    def log_message(self, *a):
        pass

    def do_HEAD(self):
        self.do_GET(body=False)

    def do_GET(self, body=True):
        self.asked.append((self.path, self.headers.get('Authorization')))
        path = self.path.split('?')[0].removeprefix('/api/models')
        repo, _, rest = path.removeprefix('/lab/').partition('/')
        folder = self.folder/repo
        files = sorted(f.relative_to(folder).as_posix() for f in folder.rglob('*') if f.is_file())
        blobs = [dict(type='file', path=f, rfilename=f, size=(folder/f).stat().st_size,
                      oid=hashlib.sha1((folder/f).read_bytes()).hexdigest()) for f in files]
        kind, _, name = rest.partition(f'/{COMMIT}')
        if not files: return self.answer(404, b'{}', body, **{'X-Error-Code': 'RepoNotFound'})
        if kind in ('revision', 'tree'):
            model = dict(id=f'lab/{repo}', sha=COMMIT, private=False, tags=[], siblings=blobs)
            text = json.dumps(model if kind == 'revision' else blobs)
            return self.answer(200, text.encode(), body, **{'Content-Type': 'application/json'})
        name = name.removeprefix('/')
        if kind != 'resolve' or name not in files:
            return self.answer(404, b'{}', body, **{'X-Error-Code': 'EntryNotFound'})
        data = (folder/name).read_bytes()
        start = int((self.headers.get('Range') or 'bytes=0-').split('=')[1].split('-')[0])
        cut = body and (repo == 'broken' or name in self.broken) and name.endswith('.safetensors')
        self.broken.discard(name)
        self.answer(206 if start else 200, data[start:], body, cut, ETag=f'"{hashlib.sha256(data).hexdigest()}"',
                    **{'X-Repo-Commit': COMMIT, 'Accept-Ranges': 'bytes'})

    def answer(self, status, data, body, cut=False, **headers):
        self.send_response(status)
        for k, v in {'Content-Length': len(data), **headers}.items():
            self.send_header(k, str(v))
        self.end_headers()
        if body:
            self.wfile.write(data[:len(data)//2] if cut else data)

@pytest.fixture
def hub(tmp_path):
    "The server, with a model that also holds what must not be fetched, and one whose decoder is pickled."
    folder = tiny_sd(tmp_path/'served'/'model')
    pickled = tiny_sd(tmp_path/'served'/'pickled')
    tiny_sd(tmp_path/'served'/'broken')
    next((pickled/'vae').glob('*.safetensors')).rename(pickled/'vae'/'diffusion_pytorch_model.bin')
    for name in UNWANTED:
        (folder/name).write_bytes(b'raise SystemExit')
    asked, broken = [], set()
    server = ThreadingHTTPServer(('127.0.0.1', 0), partial(Hub, tmp_path/'served', asked, broken))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield SimpleNamespace(url=f'http://127.0.0.1:{server.server_port}', folder=folder, asked=asked, broken=broken)
    server.shutdown()

UNWANTED = ('unet/diffusion_pytorch_model.bin', 'unet/diffusion_pytorch_model.fp16.safetensors', 'unet/my_unet.py',
            'whole.safetensors')

BRING = """
import json, sys
from synthscale.models import build_model
from synthscale.study import Study, StudyError, read_yaml
for spec in json.loads(sys.argv[1]):
    p = read_yaml('params.yaml')
    hub = dict(type='hub', input='build/nbs/02_models.ipynb', repo='lab/model', revision=sys.argv[2])
    p['models']['sd'] = hub | spec
    try:
        print(build_model(Study('.', p), 'sd').name)
    except StudyError as e:
        print('StudyError:', e)
"""

def materialize(study, hub, *specs, token=''):
    "What build_model says for each of some models named sd, in a process that takes our server for the hub."
    env = environment() | {
        'PYTHONPATH': str(ROOT), 'HF_ENDPOINT': hub.url, 'HF_HOME': str(study.dir/'hf'), 'HF_TOKEN': token,
        'HF_HUB_DISABLE_XET': '1', 'HF_HUB_DISABLE_TELEMETRY': '1', 'no_proxy': '127.0.0.1'}
    command = [sys.executable, '-c', BRING, json.dumps(specs), COMMIT]
    r = subprocess.run(command, cwd=study.dir, env=env, capture_output=True, text=True, timeout=WAIT)
    assert r.returncode == 0, r.stdout+r.stderr[-3000:]
    return r.stdout.strip().split('\n')

def test_a_model_of_the_hub_is_fetched_at_its_commit_without_pickles_or_code(study, hub):
    hub.broken.add('unet/diffusion_pytorch_model.safetensors')
    assert materialize(study, hub, {}, token='hf_secret') == ['sd']       # the line broke once: huggingface_hub went on
    model = study.path('models', 'sd')
    def names(folder):
        return {f.relative_to(folder).as_posix() for f in folder.rglob('*') if f.is_file()}
    assert names(model) - {'origin.json'} == names(hub.folder) - set(UNWANTED)
    origin = json.loads((model/'origin.json').read_text())
    assert origin == dict(kind='hub', repo='lab/model', revision=COMMIT, variant='')
    assert any(a == 'Bearer hf_secret' for _, a in hub.asked) and all(COMMIT in path for path, _ in hub.asked)
    for f in study.dir.rglob('*'):
        if f.is_file() and not f.is_symlink():
            assert b'hf_secret' not in f.read_bytes(), f
    p = load(study.dir/'params.yaml')
    p['models']['sd'] = dict(type='hub', input='build/nbs/02_models.ipynb', repo='lab/model', revision=COMMIT)
    p['generate']['sources'][NAME].update(model='sd', n_images=10)
    m = generate_source(Study(study.dir, p), NAME, workers=1)
    assert m.revision.eq(COMMIT).all() and m.model_sha256.eq(folder_sha256(model)).all()

def test_what_is_wrong_with_a_hub_model_is_said(study, hub):
    nothing, broken, other, pickled = materialize(
        study, hub, dict(repo='lab/nothing'), dict(repo='lab/broken'), dict(pipeline='StableDiffusionXLPipeline'),
        dict(repo='lab/pickled'))
    assert 'StudyError: lab/nothing@0123456789ab: cannot be fetched' in nothing
    assert 'HF_TOKEN in the environment' in nothing
    assert 'StudyError: lab/broken@0123456789ab: cannot be fetched from the hub' in broken
    assert 'holds a StableDiffusionPipeline, and models.sd.pipeline says StableDiffusionXLPipeline' in other
    assert 'vae: no weights in safetensors' in pickled

def test_a_model_that_was_made_is_left_alone(study, monkeypatch):
    """Made again only where its images, captions, settings, seed, threads or the engine have changed, or its files are
    not those that were noted; the name of its set does not count."""
    class Made(Exception):
        pass
    def make(*a):
        raise Made
    monkeypatch.setattr('synthscale.models.materialize', make)
    monkeypatch.setenv('OMP_NUM_THREADS', str(training_threads()))
    def again(change=lambda p: None):
        p = load(study.dir/'params.yaml')
        change(p)
        return build_model(Study(study.dir, p), 'mini_sd')
    out, threads = study.path('models', 'mini_sd'), training_threads()
    whole = folder_sha256(out)
    assert again() == out
    renamed = study.path('sets', 'renamed')
    renamed.symlink_to(study.path('sets', 'rendered'))
    assert again(lambda p: p['models']['mini_sd'].update(input='sets/renamed')) == out
    for change in (lambda p: p['models']['mini_sd']['unet'].update(steps=61), lambda p: p['study'].update(seed=1)):
        with pytest.raises(Made):
            again(change)
    with monkeypatch.context() as m:
        m.setenv('OMP_NUM_THREADS', str(3-threads))                   # 1 or 2; a larger machine still uses two
        with pytest.raises(Made):
            again()
    with monkeypatch.context() as m:
        m.setattr('synthscale.models.ENGINE', 99)
        with pytest.raises(Made):
            again()
    manifest = study.path('sets', 'rendered', 'manifest.parquet')
    rows = read_manifest(manifest.parent)
    for column in ('caption', 'sha256'):
        write_manifest(manifest.parent, rows.assign(**{column: 'another'}))
        with pytest.raises(Made):
            again()
    write_manifest(manifest.parent, rows)
    assert again() == out and folder_sha256(out) == whole
    weights = out/'unet'/'diffusion_pytorch_model.safetensors'
    good = weights.read_bytes()
    weights.write_bytes(good[:-1])
    with pytest.raises(Made):
        again()

def test_more_threads_than_a_model_is_trained_with_change_nothing(monkeypatch):
    used = []
    for n in (1, 2, 8):
        monkeypatch.setenv('OMP_NUM_THREADS', str(n))
        used.append(training_threads())
    assert used == [1, 2, 2]

def test_a_local_model_is_copied_without_pickles(study):
    folder = tiny_sd(study.dir/'mine')
    (folder/'unet'/'old.bin').write_bytes(b'pickle')
    p = load(study.dir/'params.yaml')
    p['models']['mine'] = dict(type='local', input='mine')
    dump(p, study.dir/'params.yaml')
    out = build_model(Study(study.dir), 'mine')
    assert not list(out.rglob('*.bin'))
    assert set(model_parts(out).part) == {'scheduler', 'text_encoder', 'tokenizer', 'unet', 'vae'}
    p['models']['mine'].update(input='nowhere')
    dump(p, study.dir/'params.yaml')
    with pytest.raises(StudyError, match='nowhere: no such folder'):
        build_model(Study(study.dir), 'mine')

# ---- filters

@given(st.integers(0, 2**31), st.integers(2, 40), st.booleans(), st.integers(0, 12))
@settings(max_examples=40, deadline=None)
def test_what_repeats_among_the_first_does_not_depend_on_the_later_ones(seed, n, near, bits):
    "Images of four kinds, some of them a little brighter in one place: near each other, equal, or neither."
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (4, 16, 16, 1), np.uint8)[rng.integers(0, 4, n)]
    for i in np.flatnonzero(rng.random(n) < .5):
        images[i, rng.integers(16), rng.integers(16)] = rng.integers(0, 256)
    labels = rng.integers(0, 2, n)
    def look(m):
        return repeats(pixel_hash(images[:m]), difference_hash(images[:m]) if near else None, labels[:m], bits)
    of = look(n)
    assert (look(n//2) == of[:n//2]).all()
    kept, left = np.flatnonzero(of < 0), np.flatnonzero(of >= 0)
    assert (of[left] < left).all() and (labels[of[left]] == labels[left]).all() and np.isin(of[left], kept).all()
    shape = difference_hash(images)
    for i in left:
        assert (images[of[i]] == images[i]).all() or near       # without `near`, only what is equal
    for c in (0, 1):
        k = [i for i in kept if labels[i] == c]
        assert len({images[i].tobytes() for i in k}) == len(k)
        if near:
            assert all(bin(int(shape[a]) ^ int(shape[b])).count('1') > bits for a in k for b in k if a < b)

def test_a_filter_that_leaves_nothing_of_a_class_says_so(generated):
    p = load(generated.dir/'params.yaml')
    p['filters'] = dict(strict=dict(set=NAME, evaluator='in_domain_classifier', min_confidence=.999999))
    s = Study(generated.dir, p)
    run_smoke(s, ('evaluators',))
    with pytest.raises(StudyError, match="filters.strict: no image of class .* is left"):
        filter_set(s, 'strict')
    assert not s.set_dir('strict').exists()

# ---- price

def test_plan_prices_every_source_before_anything_is_generated(study, capsys):
    assert main(['plan', NAME, '--study', str(study.dir)]) == 0
    out = capsys.readouterr().out
    header, row = out.strip().splitlines()[-3:-1]
    got = dict(zip(header.split(), row.split()))
    assert got['images'] == got['to_generate'] == '140' and got['passes'] == '6'
    assert float(got['images_per_s']) > 0 and float(got['hours']) > 0
    assert not (study.dir/'sets'/NAME).exists() and not list((study.dir/'build').glob('generate/*/0*'))

# ---- the embedded study's own sets

@pytest.mark.slow
def test_the_committed_sets_are_what_this_code_generates(tmp_path):
    """The first batch of one set of each family, generated again from the committed models: the same but for rounding
    (a masked token may fall the other way on another processor)."""
    d = copy_repo(tmp_path/'repo', skip=())
    sources = ('guidance_2', 'mini_if', 'mini_muse')
    generated = ' '.join(f'generate@{s}' for s in sources)
    sh(f"git init -q && dvc pull -q prompts models@mini_sd models@mini_if models@mini_muse {generated}", d)
    for name in sources:
        src = Source(Study(d), name)
        assert recipe_differs(src) == []
        rows = src.rows(0)[:src.batch_size]
        images = sample_batch(Sampler(src.model, src.how, src.texts, src.batch_size), rows, src.retry)[0]
        kept = read_shard(src.out/src.file(0).name, read_manifest(src.out).head(src.batch_size))
        off = np.array([np.abs(a.astype(int)-kept[k]).max() > 1 for a, k in zip(images, rows.key)])
        assert off.mean() <= .02, (name, off.mean())
