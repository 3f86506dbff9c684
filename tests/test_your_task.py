"The verdict: how often it is wrong on simulated runs, what it may look at, the cap on time, and what is refused."
import json, re, shutil
import numpy as np, pandas as pd, pytest
from conftest import edit
from PIL import Image
from hypothesis import given, settings, strategies as st
from synthscale.classify import read_record, sealed
from synthscale.data import build_set
from synthscale.decision import (VERDICTS, class_gains, headline, loss_gain, more_photos, photos_for, verdict_of,
                                 what_would_tell)
from synthscale.page import decision_html, study_content
from synthscale.params import problems, resolved
from synthscale.recipes import pack_values
from synthscale.retrieved import retrieve_set
from synthscale.shards import load_set
from synthscale.smoke import make_inputs, photo_params, smoke_params, write_photos
from synthscale.study import Study, StudyError, write_atomic
from synthscale.your_task import (Runs, Setting, _last_step, _run_grid, check_task, choose_recipe, near_copies_of,
                                  next_generated, run_pilots, run_task, said, save_model)

QUESTION = dict(photos='digits', candidates=['rendered'], recipes=['convnext_digits'], test_split='test',
                n_photos=[10, 20], n_pilot=20, n_more=[40], seeds=2, fresh_seeds=2)

# ---- simulated runs

def record(losses):
    "A record with these losses."
    each = {k: pack_values(losses) for k in ('loss', 'loss_calibrated')} | dict(top1=pack_values(losses < 1))
    return dict(tests=dict(test=dict(n_test=len(losses), each=each, loss_calibrated=float(losses.mean()))))

def arms(rng, ratio, n_images=300, seeds=6, seed_sd=.03, image_sd=.3):
    "Two arms whose expected losses have a ratio; runs scatter, and images move apart between the arms."
    image, shared = rng.lognormal(-.3, 1, n_images), image_sd*rng.normal(size=n_images)
    def arm(times, moved):
        return {s: record(image*times*np.exp(moved+seed_sd*rng.normal()+.2*rng.normal(size=n_images)))
                for s in range(seeds)}
    return arm(ratio, shared/2), arm(1., -shared/2)

@pytest.mark.parametrize('ratio', [1., .97])
def test_the_interval_covers_what_is_true(ratio):
    "Also where images differ in how they react, which more seeds would not show."
    rng, hits, n = np.random.default_rng(0), 0, 300
    for _ in range(n):
        image = rng.lognormal(-.3, 1, 300)
        react = .3*rng.normal(size=300)
        def arm(times, sign):
            return {s: record(image*times*np.exp(sign*react/2+.03*rng.normal()+.2*rng.normal(size=300)))
                    for s in range(6)}
        g = loss_gain(arm(ratio, 1), arm(1., -1), 'test')
        hits += g['ci_lo'] < ratio < g['ci_hi']
    assert .91 <= hits/n <= .985

def test_images_that_do_nothing_are_recommended_in_at_most_one_case_of_twenty():
    "The worst case: both controls are as good as the mixture."
    rng, wrong, n = np.random.default_rng(1), 0, 300
    for _ in range(n):
        with_, alone = arms(rng, 1.)
        longer = {s: record(np.maximum(np.exp(.03*rng.normal())*v, 1e-9)) for s, v in
                  ((s, image) for s, image in zip(alone, [unpacked(r) for r in alone.values()]))}
        gains = dict(alone=loss_gain(with_, alone, 'test'), longer=loss_gain(with_, longer, 'test'))
        wrong += verdict_of(gains) == 'generate'
    assert wrong/n <= .05

def unpacked(r):
    "The losses of a record."
    from synthscale.decision import image_values
    return image_values(r, 'test', 'loss_calibrated').astype(float)

def test_a_real_help_is_found():
    rng = np.random.default_rng(2)
    found = [verdict_of(dict(alone=loss_gain(*arms(rng, .85), 'test'))) for _ in range(60)]
    assert found.count('generate') >= 54

def test_classes_without_a_change_are_rarely_named():
    "Ten classes in each of 60 studies: with Holm at most a few studies name one."
    rng, labels, named = np.random.default_rng(3), np.arange(300) % 10, 0
    for _ in range(60):
        rows = class_gains(*arms(rng, 1.), 'test', labels, list('abcdefghij'))
        named += any(r['words'] != 'no change shown' for r in rows)
    assert named <= 8

gain_of = st.tuples(st.floats(.2, 3), st.floats(1.001, 2)).map(
    lambda v: dict(ratio=v[0], ci_lo=v[0]/v[1], ci_hi=v[0]*v[1], sd_seeds=.05, sd_images=.05, n_seeds=4, n_test=100))

@given(st.lists(gain_of, min_size=1, max_size=3))
def test_a_verdict_needs_every_control(gains):
    named = {str(i): g for i, g in enumerate(gains)}
    v = verdict_of(named)
    assert v in VERDICTS and (v == 'generate') == all(g['ci_hi'] < 1 for g in gains)
    assert (v == 'do not generate') == any(g['ci_lo'] > 1 for g in gains)
    worse = named | dict(more=dict(gains[0], ci_lo=1.1, ratio=1.2, ci_hi=1.3))
    assert verdict_of(worse) == 'do not generate'

@given(st.integers(10, 5000), st.floats(.3, 1.3), st.floats(.01, 2))
def test_photographs_and_losses_say_the_same(n, ratio, k):
    "The photographs that a gain is worth give that gain along the curve."
    more = more_photos(n, ratio, k)
    assert more >= 0 and (more == 0) == (ratio >= 1)
    if 0 < more < 1e9:
        assert np.isclose((1+more/n)**-k, ratio)
    worth = photos_for(n, dict(ratio=ratio, ci_lo=ratio*.9, ci_hi=ratio*1.1), dict(k=k, ci_lo=k/2, ci_hi=2*k))
    known = [v for v in (worth['ci_lo'], worth['n'], worth['ci_hi']) if v is not None]
    assert known == sorted(known)

@given(gain_of)
@settings(max_examples=40)
def test_more_runs_are_proposed_only_where_they_would_tell(g):
    need = what_would_tell(g)
    assert need['runs'] is None or need['runs'] >= g['n_seeds']
    assert need['test_images'] is None or need['test_images'] >= g['n_test']
    assert need['both'] or not (need['runs'] or need['test_images'])

# ---- real runs

@pytest.fixture(scope='module')
def decided(tmp_path_factory):
    "A small study with an answer."
    d = tmp_path_factory.mktemp('asked')
    p = smoke_params()
    p['your_task'] = dict(decision=QUESTION)
    write_atomic(d/'params.yaml', json.dumps(p))
    make_inputs(d/'data')
    study = Study(d)
    assert problems(study) == []
    for s in ('digits', 'rendered'):
        build_set(study, s)
    return study, run_task(study, 'decision', 1)

def test_only_the_validation_split_is_looked_at_before_the_last_step(decided):
    "With every test number of the pilots turned round the choice is the same; with those of the validation split not."
    study, out = decided
    def chosen(change):
        runs = Runs(study, check_task(study, 'decision'), 1)
        recipe = choose_recipe(runs)
        first = run_pilots(runs, recipe)
        for s, by in runs.done.items():
            for r in by.values():
                change(s, r['tests'])
        return first, run_pilots(runs, recipe)
    def tests(s, t):
        t['test']['loss_calibrated'] = -t['test']['loss_calibrated']
    def validation(s, t):
        t['val']['loss_calibrated'] = -t['val']['loss_calibrated']
    first, again = chosen(tests)
    assert first == again and first.n_synthetic == out['source']['n_synthetic']
    first, again = chosen(validation)
    assert first != again

def test_the_last_step_has_seeds_that_nothing_was_chosen_on(decided):
    study, out = decided
    lines = study.path('runs', 'your_task', 'decision', 'points.jsonl').read_text().splitlines()
    assert out['gain']['n_seeds'] == out['fresh_seeds'] == 2
    seeds = {json.loads(x)['config']['seed'] for x in lines}
    assert seeds == {study.seed('point', k) for k in range(4)}

def test_an_answer_is_found_again_without_a_run(decided, tmp_path):
    "From what DVC keeps, in a clone that has no other point."
    study, out = decided
    shutil.copytree(study.dir, tmp_path/'clone', symlinks=True)
    clone = Study(tmp_path/'clone')
    shutil.rmtree(clone.path('build', 'points'))
    before = clone.path('runs', 'your_task', 'decision', 'points.jsonl').read_bytes()
    assert run_task(clone, 'decision', 1) == out
    assert clone.path('runs', 'your_task', 'decision', 'points.jsonl').read_bytes() == before

def at_equal_speed(study, folder):
    "A copy of a study whose runs all took as long for an image, however busy the machine was."
    shutil.copytree(study.dir, folder, symlinks=True)
    study = Study(folder)
    for f in study.path('build', 'points').rglob('*.json'):
        r = json.loads(f.read_text())
        r['made']['wall_s'] = 1e-3*r['config']['samples_seen']
        f.write_text(json.dumps(sealed(r)))
        assert read_record(f.read_text())
    return study

def test_what_does_not_fit_into_the_minutes_is_left_out_and_said(decided, tmp_path):
    "Pilots come first, larger sizes only if the last step still fits behind them; with less there is no verdict."
    study = at_equal_speed(decided[0], tmp_path/'copy')
    spec = check_task(study, 'decision')
    def asked(minutes):
        runs = Runs(study, spec.model_copy(update=dict(minutes=minutes)), 1)
        return runs, run_pilots(runs, choose_recipe(runs))
    runs = Runs(study, spec, 1)
    pilot = Setting(choose_recipe(runs), 20, 'rendered', 20)
    enough = runs.spent+runs.cost([pilot], range(2))+runs.cost(*_last_step(runs, pilot))
    assert not asked(10*enough)[0].left_out
    runs, chosen = asked(1.001*enough)
    assert runs.left_out == ['20 photographs and 40 of rendered'] and chosen == pilot
    with pytest.raises(StudyError, match='allow more, or a recipe with fewer'):
        asked(enough/50)

def test_a_recipe_that_takes_too_long_is_still_compared_on_the_photographs(decided, tmp_path):
    "As far as there is time; and it is said if it is better."
    study = at_equal_speed(decided[0], tmp_path/'copy')
    p = json.loads(study.path('params.yaml').read_text())
    slow = p['recipes']['convnext_digits']
    p['recipes']['slow'] = slow | dict(samples_seen_at_100=8*slow['samples_seen_at_100'])
    p['your_task']['decision'] |= dict(recipes=['convnext_digits', 'slow'])
    write_atomic(study.path('params.yaml'), json.dumps(p))
    spec = check_task(Study(study.dir), 'decision')
    everything = Runs(Study(study.dir), spec, 1)
    choose_recipe(everything)
    study = at_equal_speed(everything.study, tmp_path/'all')
    def asked(times):
        "With a multiple of the minutes of one short run."
        one = Runs(study, spec, 1)
        one.add([Setting('convnext_digits', 20)], range(1))
        runs = Runs(study, spec.model_copy(update=dict(minutes=times*one.spent)), 1)
        chosen = choose_recipe(runs)
        return chosen, len(runs.done[Setting('slow', 20)]), runs.left_out
    assert everything.left_out == [] and asked(1000)[2] == []
    # 2 + 16 for the anchors, and for what follows 12 with the short recipe or 96 with the long one
    chosen, n, left_out = asked(40)
    assert (chosen, n) == ('convnext_digits', 2) and 'recipe slow: with it, the rest would not fit' in left_out[0]
    better = choose_recipe(everything) == 'slow'
    assert len(left_out) == 1+better and all('slow is better on the photographs' in x for x in left_out[1:])
    assert asked(25)[:2] == ('convnext_digits', 1)

WRONG = [
    (dict(photos='rendered'), 'a set of real images'), (dict(candidates=['uci']), 'no such set'),
    (dict(recipes=['convnext']), 'no such recipe'), (dict(test_split='val'), 'no such test split'),
    (dict(n_photos=[20, 10]), 'sizes that rise'), (dict(candidates=['digits']), 'sets of generated images'),
    (dict(real_share=1.), 'real_share is 1.0'), (dict(fresh_seeds=1), 'fresh_seeds is 1'),
    (dict(minutes=0.), 'minutes is 0'), (dict(recipes=[]), 'recipes is')]

@pytest.mark.parametrize('odd, says', WRONG, ids=[s[:20] for _, s in WRONG])
def test_a_question_that_cannot_be_is_said(decided, odd, says):
    study, _ = decided
    p = study.raw | dict(your_task=dict(decision=QUESTION | odd))
    assert any(says in text for text in problems(Study(study.dir, p))), problems(Study(study.dir, p))

def test_a_size_that_the_photographs_do_not_have_is_said(decided):
    study, _ = decided
    p = study.raw | dict(your_task=dict(decision=QUESTION | dict(n_photos=[100000])))
    with pytest.raises(StudyError, match='your_task.decision'):
        check_task(Study(study.dir, p), 'decision')

def test_a_study_without_generated_images_says_what_photographs_give(decided, tmp_path):
    study, _ = decided
    shutil.copytree(study.dir, tmp_path/'alone', symlinks=True)
    edit(tmp_path/'alone', lambda p: p['your_task']['decision'].update(candidates=[]))
    alone = Study(tmp_path/'alone')
    out = run_task(alone, 'decision', 1)
    assert out['verdict'] == '' and 'gain' not in out and len(out['curve']) == 2
    assert 'no generated images' in said(out)
    save_model(alone, 'decision', tmp_path/'model')
    assert {f.name for f in (tmp_path/'model').iterdir()} == {'README.md', 'config.json', 'model.safetensors'}
    with pytest.raises(StudyError, match='not empty'):
        save_model(alone, 'decision', tmp_path/'model')

# ---- photos of a pool among the candidates

@pytest.fixture(scope='module')
def rivals(tmp_path_factory):
    "A small study whose candidates are photos of a pool and, as generated images, some with wrong labels; its answer."
    d = tmp_path_factory.mktemp('rivals')
    write_photos(d/'data')
    for c, wrong in (('temple', 'flower'), ('flower', 'temple')):
        shutil.copytree(d/'data'/'photos'/'train'/c, d/'data'/'wrong'/wrong)
    p = photo_params()
    p['data']['sets']['wrong'] = dict(type='imagefolder', input='wrong', synthetic=True)
    p['data']['image_size'] = 8
    p['retrieved']['nearest']['fewer'] = True
    p['recipes']['convnext_digits'] |= dict(samples_seen_at_100=2560)
    p['your_task'] = dict(decision=QUESTION | dict(photos='photos', candidates=['wrong', 'nearest'], n_photos=[24, 48],
                                                   n_pilot=40, n_more=[], seeds=1))
    write_atomic(d/'params.yaml', json.dumps(p))
    study = Study(d)
    assert problems(study) == []
    for s in study.data.sets:
        build_set(study, s)
    retrieve_set(study, 'nearest')
    return study, run_task(study, 'decision', 1)

def test_retrieved_photos_compete_and_are_called_what_they_are(rivals):
    "The best on the validation split is measured again; the value of the verdict is as for generated images."
    study, out = rivals
    tried = {c['candidate']: c for c in out['candidates']}
    assert {n: c['kind'] for n, c in tried.items()} == dict(wrong='generated', nearest='retrieved')
    best = min(out['candidates'], key=lambda c: c['validation_loss'])
    assert out['candidates'][0] == best and best['candidate'] == out['source']['set'] == 'nearest'
    assert out['kind'] == 'retrieved' and out['verdict'] in VERDICTS
    assert (out['source']['pool'], out['source']['backbone']) == ('pool', 'net') and 'model' not in out['source']
    text = said(out)
    assert out['headline'] == headline(out['verdict'], 'retrieved') and text.startswith(out['headline'].upper())
    first, second, third, *_ = text.split('\n')
    n = out['source']['n_synthetic']
    assert 'with retrieved photos the loss' in second and f'{n} retrieved photos of pool' in second
    assert 'generated' not in f'{first}{second}{third}'.lower() and 'wrong (40 generated images)' in text
    assert not any('generated' in d['words'] for d in out['drawn'])
    settings = pd.read_csv(study.path('results', 'decision_settings.csv'))
    assert settings[settings.chosen].kind.tolist() == ['retrieved']

def test_the_page_and_the_card_of_retrieved_photos_name_the_pool(rivals, tmp_path):
    study, out = rivals
    html = decision_html(study_content(study))
    text = re.sub('<[^>]*>', ' ', html)
    assert f"{out['headline'].capitalize()}." in text and 'pool  pool' in text and 'compared by  net' in text
    assert 'loss on the validation split' in text and 'Images' in text
    helped = out | dict(verdict='generate', headline='add retrieved photos')
    shutil.copytree(study.dir, tmp_path/'helped', symlinks=True)
    (tmp_path/'helped'/'results'/'decision.json').write_text(json.dumps(helped))
    save_model(Study(tmp_path/'helped'), 'decision', tmp_path/'model')
    card = (tmp_path/'model'/'README.md').read_text()
    assert '**add retrieved photos**' in card and 'Retrieved photos: the set nearest, chosen from pool' in card
    assert 'Generated images' not in card and 'of nearest' in card

def test_every_verdict_on_retrieved_photos_says_no_generation():
    assert [headline(v) for v in VERDICTS] == [*VERDICTS]
    assert [headline(v, 'retrieved') for v in VERDICTS] == ['add retrieved photos', 'do not add retrieved photos',
                                                            'cannot tell']

WEAK = [(dict(photos='nearest'), "your_task.decision.photos is 'nearest': expected a set of real images whose labels"),
        (dict(candidates=['pool']), "your_task.decision.candidates is 'pool': expected sets of generated images"),
        (dict(candidates=['photos']), 'or of photos under retrieved'),
        (dict(test_split='train'), 'no such test split')]

@pytest.mark.parametrize('odd, says', WEAK, ids=['photos', 'pool', 'labelled', 'test'])
def test_labels_that_nobody_gave_are_only_trained_on(rivals, odd, says):
    study, _ = rivals
    p = json.loads(json.dumps(study.raw))
    p['your_task']['decision'] |= odd
    assert any(says in text for text in problems(Study(study.dir, p))), problems(Study(study.dir, p))

def test_the_pool_of_a_candidate_decides_the_stage_and_other_questions_stay_as_they_were(rivals, decided):
    study, _ = rivals
    other = json.loads(json.dumps(study.raw))
    other['data']['sets']['pool']['synthetic'] = True
    a, b = (resolved(Study(study.dir, p))['your_task']['decision'] for p in (study.raw, other))
    assert a['retrieved']['nearest']['kind'] == 'retrieved' != b['retrieved']['nearest']['kind']
    assert 'retrieved' not in resolved(decided[0])['your_task']['decision']

def test_an_answer_is_there_where_every_validation_image_is_named_right_without_doubt(decided):
    "A loss of 0 has no logarithm, so no mixture law; what was trained is not lost by that."
    study, out = decided
    runs = Runs(study, check_task(study, 'decision'), 1)
    chosen = run_pilots(runs, choose_recipe(runs))
    _run_grid(runs, chosen, 0.)
    assert next_generated(runs, chosen)['n'] == 1000
    for by in runs.done.values():
        for r in by.values():
            r['tests']['val']['loss_calibrated'] = 0.
    assert next_generated(runs, chosen) is None

def test_near_copies_of_tested_images_are_counted_and_the_answer_says_so(decided, tmp_path):
    "They are no longer the same pixels, so nothing refuses them."
    first, out = decided
    shutil.copytree(first.dir, tmp_path/'copy', symlinks=True)
    test = load_set(first.set_dir('digits'), 'test')
    for i in range(40):
        to = tmp_path/'copy'/'data'/'near'/first.study.classes[test.labels[i]]/f'{i}.png'
        to.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((test.images[i, ..., 0]//2*2+1).astype(np.uint8)).save(to)
    p = json.loads((tmp_path/'copy'/'params.yaml').read_text())
    p['data']['sets']['near'] = dict(type='imagefolder', input='data/near', synthetic=True, fewer_classes=True)
    write_atomic(tmp_path/'copy'/'params.yaml', json.dumps(p))
    study = Study(tmp_path/'copy')
    build_set(study, 'near')
    runs = Runs(study, check_task(study, 'decision'), 1)
    found = near_copies_of(runs, 'near')
    assert found['tested'] > 30 and found['of'] == 40 and near_copies_of(runs, 'rendered')['tested'] == 0
    assert 'not to be relied on: ' not in said(out)
    assert 'not to be relied on: ' in said(out | dict(near_copies=found)).split('\n')[1]
