"The verdict: how often it is wrong on simulated runs, what it may look at, the cap on time, and what is refused."
import base64, io, json, re, shutil
import numpy as np, pandas as pd, pytest
from conftest import ROOT, edit
from PIL import Image
from hypothesis import given, settings, strategies as st
from synthscale.classify import read_record, samples_shown, sealed
from synthscale.data import build_set
from synthscale.decision import (FEW_IMAGES, VERDICTS, class_gains, doubt_of, headline, level_at, loss_gain,
                                 marked_classes, more_photos, photos_for, verdict_of, what_would_tell)
from synthscale.page import decision_html, study_content
from synthscale.params import problems, resolved
from synthscale.recipes import pack_values
from synthscale.retrieved import retrieve_set
from synthscale.shards import load_set
from synthscale.smoke import make_inputs, photo_params, smoke_params, write_photos
from synthscale.study import Study, StudyError, write_atomic
from synthscale.your_task import (Runs, Setting, _last_step, _reserve, check_task, choose_recipe,
                                  class_pictures, drawn_classes, next_generated, run_curve_of_photos, run_pilots,
                                  run_task, said, save_model)

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

@pytest.mark.parametrize('spread, n', [(1., 20), (1.5, 20), (2., 20), (2., 60), (2.5, 200)])
def test_a_few_images_that_make_up_the_loss_mislead_no_more_than_many_that_are_alike(spread, n):
    "With losses of very unequal size a mean rests on a few images, however many there are."
    rng, wrong, trials = np.random.default_rng(4), [0, 0], 200
    for _ in range(trials):
        image, react = rng.lognormal(-1, spread, n), .5*rng.normal(size=n)
        def arm(sign):
            return {s: record(image*np.exp(sign*react/2+.03*rng.normal()+.2*rng.normal(size=n))) for s in range(6)}
        g = loss_gain(arm(1), arm(-1), 'test')
        wrong[0] += g['ci_hi'] < 1
        wrong[1] += g['ci_lo'] > 1
    assert max(wrong)/trials <= .04, wrong          # 2.5 % are allowed; 7 of 200 at most in 95 % of such tests

@given(st.integers(0, 10**6), st.integers(2, 8), st.integers(3, 40), st.floats(.2, 5), st.floats(0, 2))
@settings(max_examples=60, deadline=None)
def test_an_interval_of_a_ratio_keeps_its_laws(seed, seeds, n, times, spread):
    "It holds the estimate, turns round with the arms, goes with the unit of one arm, and 1 is in it where p says so."
    rng = np.random.default_rng(seed)
    a, b = ({s: record(rng.lognormal(0, spread, n)+1e-3) for s in range(seeds)} for _ in range(2))
    g, back = loss_gain(a, b, 'test'), loss_gain(b, a, 'test')
    assert g['ci_lo'] < g['ratio'] < g['ci_hi']
    assert np.isclose(g['ratio']*back['ratio'], 1, rtol=1e-6)
    for lo, hi in (('ci_lo', 'ci_hi'), ('ci_hi', 'ci_lo')):
        ends = sorted([g[lo], 1/back[hi] if back[hi] else np.inf])
        assert np.isclose(*ends, rtol=1e-3) or ends[0] <= 1.1e-3 or ends[1] >= 900
    assert (g['p'] < .05) == (not g['ci_lo'] <= 1 <= g['ci_hi']) or abs(g['p']-.05) < 1e-3
    wider = loss_gain(a, b, 'test', level=level_at(3))
    assert wider['ci_lo'] <= g['ci_lo'] and g['ci_hi'] <= wider['ci_hi']
    doubled = {s: record(2*np.asarray(unpacked(r))) for s, r in a.items()}
    assert np.isclose(loss_gain(doubled, b, 'test')['ratio'], 2*g['ratio'], rtol=1e-3)

def test_runs_and_images_that_are_all_alike_leave_no_error():
    same = {s: record(np.full(30, .5)) for s in range(4)}
    less = {s: record(np.full(30, .4)) for s in range(4)}
    g = loss_gain(less, same, 'test')
    assert np.isclose(g['ratio'], .8, rtol=1e-3) and .79 < g['ci_lo'] <= g['ci_hi'] < .81 and g['p'] < 1e-6
    g = loss_gain(same, same, 'test')
    assert g['ci_lo'] <= 1 <= g['ci_hi'] and verdict_of(dict(alone=g)) == 'cannot tell'

def gain(ratio, wide, n_test=300):
    "A gain as `loss_gain` gives it."
    return dict(ratio=ratio, ci_lo=ratio/wide, ci_hi=ratio*wide, n_test=n_test, n_seeds=6)

DOUBTS = [('helps, and plainly, too', .9, .9, 300, 300, ''), ('harms, and plainly, too', 1.2, 1.2, 300, 300, ''),
          ('helps, but plainly it harms, few validation images', .9, 1.2, 300, 99, 'says otherwise'),
          ('helps, but plainly it harms, many validation images', .9, 1.2, 300, 100, ''),
          ('harms, but plainly it is shown to help', 1.65, .93, 300, 28, 'says otherwise'),
          ('harms, but plainly it is shown to help, many validation images', 1.65, .9, 300, 5000, ''),
          ('helps, plainly a little worse, few validation images', .9, 1.01, 300, 28, 'says otherwise'),
          ('helps, plainly a little worse, many validation images', .9, 1.01, 300, 300, ''),
          ('helps on few test images', .9, .9, 12, 300, 'too few'),
          ('nothing on few test images', 1., 1., 12, 300, 'too few'),
          ('nothing', 1., .8, 300, 28, '')]

@pytest.mark.parametrize('name, ratio, plain, n_test, n_val, says', DOUBTS, ids=[d[0] for d in DOUBTS])
def test_a_verdict_is_doubted_where_its_ground_is_thin(name, ratio, plain, n_test, n_val, says):
    gains, others = ({k: gain(r, 1.03, n_test) for k in ('alone', 'longer')} for r in (ratio, plain))
    found = doubt_of(gains, others, n_val)
    assert (says in found) and bool(found) == bool(says)

@pytest.mark.parametrize('spread', [1., 2.])
def test_classes_are_not_named_for_a_few_images_that_make_up_their_loss(spread):
    rng, labels, named = np.random.default_rng(5), np.arange(200) % 10, 0
    for _ in range(40):
        image, react = rng.lognormal(-1, spread, 200), .5*rng.normal(size=200)
        a, b = ({s: record(image*np.exp(sign*react/2+.03*rng.normal()+.2*rng.normal(size=200))) for s in range(6)}
                for sign in (1, -1))
        named += any(r['words'] != 'no change shown' for r in class_gains(a, b, 'test', labels, list('abcdefghij')))
    assert named <= 5

def test_of_a_class_with_few_test_images_nothing_is_said():
    rng = np.random.default_rng(6)
    labels = np.repeat([0, 1], [FEW_IMAGES-1, FEW_IMAGES])
    few, enough = class_gains(*arms(rng, .2, len(labels)), 'test', labels, list('ab'))
    assert few['words'] == 'too few test images' and enough['words'] == 'gains' and np.isnan(few['p'])

def test_another_look_at_the_same_images_does_not_find_what_is_not_there():
    "Who adds runs until an interval leaves 1 finds one that does; with `test_looks` counted, in at most one of 20."
    rng, wrong, trials = np.random.default_rng(7), 0, 150
    for _ in range(trials):
        a, b = arms(rng, 1., 200, 50, .06, .1)
        k, looks = 6, 1
        while True:
            g = loss_gain(*({s: arm[s] for s in range(k)} for arm in (a, b)), 'test', level=level_at(looks))
            more = what_would_tell(g, looks=looks)['runs']
            if verdict_of(dict(alone=g)) != 'cannot tell' or not more or more <= k: break
            k, looks = min(more, 50), looks+1
        wrong += verdict_of(dict(alone=g)) != 'cannot tell'
    assert wrong/trials <= .09                                    # 5 % are allowed, on both sides together

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
    enough = runs.spent+runs.cost([pilot], range(2))+_reserve(runs, pilot)
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
    better = choose_recipe(everything) == 'slow'
    assert (chosen, n) == ('convnext_digits', 2) and len(left_out) == better       # of a worse one nothing is lost
    assert all('slow is better on the photographs' in x for x in left_out)
    chosen, n, left_out = asked(25)
    assert (chosen, n) == ('convnext_digits', 1)
    assert left_out[0] == 'recipe slow: the question, asked with it, would not fit into the time'

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

def test_the_next_images_can_harm_and_longer_training_is_not_their_help(decided):
    "From pilots of one length with different numbers of images; a loss of 0 has no logarithm, and loses no answer."
    study, out = decided
    runs = Runs(study, check_task(study, 'decision'), 1)
    chosen = run_pilots(runs, choose_recipe(runs))
    sizes = {s.n_synthetic: by for s, by in runs.done.items() if s.candidate}
    mixed = [s for s in runs.done if s.candidate]
    shown = {samples_shown(study, p) for p in runs.points(mixed, range(50, 51)).values()}
    assert sorted(sizes) == [20, 40] and len(shown) == 1
    before = next_generated(runs, chosen)
    assert before['n'] == 1000 and before['ci_lo'] < before['ratio'] < before['ci_hi']
    for times, harm in ((4, True), (.01, False)):                  # what the larger number does to each image
        for r in sizes[40].values():
            m = r['tests']['val']
            values = times*np.asarray(unpacked(dict(tests=dict(test=m))))
            m['each'] = m['each'] | dict(loss_calibrated=pack_values(values))
        assert (next_generated(runs, chosen)['ratio'] > 1) == harm
    for r in (r for by in runs.done.values() for r in by.values()):
        r['tests']['val']['loss_calibrated'] = 0.
    assert next_generated(runs, chosen) is None

def with_set(study, folder, name, labelled):
    "A copy of a study with one more set of generated images, from (image, label)."
    shutil.copytree(study.dir, folder, symlinks=True)
    for i, (x, y) in enumerate(labelled):
        to = folder/'data'/name/study.study.classes[y]/f'{i}.png'
        to.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(x.astype(np.uint8)).save(to)
    p = json.loads((folder/'params.yaml').read_text())
    p['data']['sets'][name] = dict(type='imagefolder', input=f'data/{name}', synthetic=True, fewer_classes=True)
    p['your_task']['decision'] |= dict(candidates=[name], n_more=[])
    write_atomic(folder/'params.yaml', json.dumps(p))
    study = Study(folder)
    build_set(study, name)
    return study

@pytest.mark.parametrize('copied, left', [(40, True), (290, False)])
def test_test_images_with_a_near_copy_among_the_images_are_not_compared(decided, tmp_path, copied, left):
    "They are no longer the same pixels, so nothing refuses them; with too few others nothing is said."
    test = load_set(decided[0].set_dir('digits'), 'test')
    near = [(test.images[i, ..., 0]//2*2+1, test.labels[i]) for i in range(copied)]
    study = with_set(decided[0], tmp_path/'copy', 'near', near)
    out = run_task(study, 'decision', 1)
    n = len(test.labels)
    assert out['near_copies']['tested'] >= copied-2 and out['near_copies']['of'] == copied
    if left:
        apart = out['gain']['test_images_left_out']
        assert copied-2 <= apart <= n-FEW_IMAGES and out['gain']['n_test'] == n-apart
        assert sum(c['n_test'] for c in out['classes']) <= n-apart
        assert f'{apart} more test images are left out' in said(out)
    else:
        assert out['verdict'] == 'cannot tell' and f'of {n} test images have near copies' in out['doubt']
        assert out['doubt'] in out['why'] and out['doubt'] in said(out)
        assert out['would_change'] == 'images without near copies of those that are tested on'
    assert decided[1]['gain']['test_images_left_out'] == 0 and 'left out' not in said(decided[1])

def test_what_balanced_classes_leave_of_a_candidate_is_said(decided, tmp_path):
    "One image of a class: one of each is used."
    some = load_set(decided[0].set_dir('rendered'), 'train')
    kept = np.flatnonzero((some.labels != 3) | (np.cumsum(some.labels == 3) == 1))
    study = with_set(decided[0], tmp_path/'copy', 'odd', [(some.images[i, ..., 0], some.labels[i]) for i in kept])
    out, c = run_task(study, 'decision', 1), study.study.classes[3]
    assert out['unused'] == [f'of odd at most 10 of its {len(kept)} images can be used: classes are balanced '
                             f'(classify.balance), and {c} has 1']
    assert out['unused'][0] in said(out) and out['source']['n_synthetic'] == 10 and decided[1]['unused'] == []

def test_a_name_that_another_stage_writes_to_is_refused(decided):
    "Every file of results in dvc.yaml that a question would write, too."
    study, _ = decided
    files = set(re.findall(r'results/([a-z_]+)\.json', (ROOT/'dvc.yaml').read_text()))
    tables = set(re.findall(r'results/([a-z_]+)\.csv', (ROOT/'dvc.yaml').read_text()))
    assert files and not any(t.endswith('_settings') for t in tables)
    for name in files:
        p = study.raw | dict(your_task={name: QUESTION})
        assert any(f'your_task is {name!r}' in text for text in problems(Study(study.dir, p)))

# ---- the cap on time

@pytest.mark.parametrize('processes', [1, 2, 64])
@pytest.mark.parametrize('recipes', [1, 4])
def test_what_is_admitted_can_be_finished(decided, monkeypatch, processes, recipes):
    "Whatever the minutes: either everything is done within them, or it is said before the last step how many it takes."
    study, names = decided[0], [f'r{i}' for i in range(recipes)]
    raw = json.loads(json.dumps(study.raw))
    raw['recipes'] |= dict.fromkeys(names, raw['recipes']['convnext_digits'])
    clock = [0.]
    def fake(study, points, workers, what):
        "Each run takes 5 seconds for 100 images shown; `processes` of them at a time."
        each = {p: .05*samples_shown(study, p) for p in points}
        free = [0.]*processes
        for w in sorted(each.values(), reverse=True):                      # as the loop does
            free[free.index(min(free))] += w
        clock[0] += max(free)/60 if each else 0
        values = {p: 1+.01*i for i, p in enumerate(points)}
        return {p: dict(made=dict(wall_s=w), config=dict(samples_seen=samples_shown(study, p)), tests={
            k: dict(loss_calibrated=values[p], top1=.5) for k in ('val', 'test')}) for p, w in each.items()}
    monkeypatch.setattr('synthscale.your_task.run_points', fake)
    monkeypatch.setattr('synthscale.your_task.usable_processes', lambda workers: processes)
    def asked(minutes):
        raw['your_task']['decision'] |= dict(recipes=names, minutes=minutes, seeds=3, fresh_seeds=6)
        clock[0], runs = 0., Runs(Study(study.dir, raw), Study(study.dir, raw).your_task['decision'])
        recipe = choose_recipe(runs)
        chosen = run_pilots(runs, recipe)
        run_curve_of_photos(runs, recipe, _reserve(runs, chosen))
        runs.add(*_last_step(runs, chosen))
        return runs
    whole, done = asked(1e6), []
    first = whole.took[0]/60
    for share in np.linspace(.02, 1.02, 26):
        minutes = share*whole.spent
        try:
            runs = asked(minutes)
        except StudyError as e:
            assert 'allow more' in str(e) and clock[0] <= max(minutes, first)      # one run of each tells the costs
            enough = float(re.search(r'needs about (\d+)', str(e))[1])
            assert asked(enough) and clock[0] <= enough
            continue
        done.append(share)
        assert np.isclose(runs.spent, clock[0]) and clock[0] <= minutes
    assert done

# ---- the look at the images, and pictures

def chosen_of(study, out):
    "Runs of an answer, and its choice."
    runs = Runs(study, check_task(study, 'decision'), 1)
    return runs, Setting(out['recipe'], out['photos']['n'], out['source']['set'], out['source']['n_synthetic'])

def test_the_look_trains_once_and_its_time_counts(decided, tmp_path, monkeypatch):
    "Made where nothing is kept, then read; also from the points alone, which is what a clone has."
    study, out = decided
    shutil.copytree(study.dir, tmp_path/'clone', symlinks=True)
    clone, trained = Study(tmp_path/'clone'), []
    monkeypatch.setattr('synthscale.your_task.trained_net', counted(trained))
    runs, chosen = chosen_of(clone, out)
    assert drawn_classes(runs, chosen) == out['drawn'] and trained == []
    [look] = runs.looks
    assert runs.spent == look['made']['wall_s']/60 > 0
    shutil.rmtree(clone.path('build', 'points'))
    assert run_task(clone, 'decision', 1) == out and trained == []            # points.jsonl has it
    shutil.rmtree(clone.path('build', 'points'))
    clone.path('runs', 'your_task', 'decision', 'points.jsonl').unlink()
    assert drawn_classes(runs, chosen) == out['drawn'] and len(trained) == 1
    lines = study.path('runs', 'your_task', 'decision', 'points.jsonl').read_text().splitlines()
    looks = [r for r in map(read_record, lines) if 'recognized' in r]
    assert len(looks) == 1 and 'looked_at' in looks[0]['config']

def counted(trained):
    "The function that trains, which notes each call."
    from synthscale.classify import trained_net
    def train(study, point):
        trained.append(point)
        return trained_net(study, point)
    return train

def test_another_look_is_another_record(decided, monkeypatch):
    "Other generated images, and another number of photographs, are not taken for those that were looked at."
    study, out = decided
    runs, chosen = chosen_of(study, out)
    first = drawn_classes(runs, chosen) and runs.looks[0]
    fewer = drawn_classes(runs, Setting(chosen.recipe, 10, chosen.candidate, 20)) and runs.looks[0]
    monkeypatch.setattr('synthscale.your_task._LOOKED_AT', 50)
    some = drawn_classes(runs, chosen) and runs.looks[0]
    assert len({r['key'] for r in (first, fewer, some)}) == 3 and some['recognized'] != first['recognized']

def pixels(uri):
    "The images of a strip."
    kind, data = uri.split(';base64,')
    assert kind == 'data:image/png'
    a = np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))
    return np.split(255-a, a.shape[1]//a.shape[0], 1)

def test_pictures_are_training_images_of_the_marked_classes(decided):
    "Each strip has images of its own class of the right set, and none of a split that is tested."
    study, out = decided
    found = json.loads(study.path('runs', 'your_task', 'decision', 'pictures.json').read_text())
    marked = marked_classes(out)
    assert [p['class'] for p in found] == list(marked)[:6] != [] and all(p['words'] for p in found)
    own, made = (load_set(study.set_dir(s), 'train') for s in ('digits', 'rendered'))
    tested = [x.tobytes() for k in ('val', 'test') for x in load_set(study.set_dir('digits'), k).images[..., 0]]
    for p in found:
        i = study.study.classes.index(p['class'])
        for of, key in ((own, 'photos'), (made, 'added')):
            strip = [x.tobytes() for x in pixels(p[key])]
            assert len(strip) == 4 and not {*strip} & {*tested}
            assert {*strip} <= {x.tobytes() for x in of.images[of.labels == i][..., 0]}

def test_a_class_without_images_has_no_strip(decided):
    "A class of the study that no image of the sets is of."
    study, _ = decided
    more = Study(study.dir, study.raw | dict(study=study.raw['study'] | dict(classes=[*study.study.classes, 'ten'])))
    out = dict(photos=dict(set='digits'), source=dict(set='rendered'),
               classes=[{'class': 'ten', 'ratio': 2., 'words': 'loses'}])
    assert class_pictures(more, out) == [{'class': 'ten', 'words': 'loses', 'photos': '', 'added': ''}]

def test_large_colour_images_become_small_ones(tmp_path):
    "Colours stay, and a strip of four is at most 64 pixels high."
    rng = np.random.default_rng(0)
    for name, split in (('photos', 'train/'), ('photos', 'val/'), ('photos', 'test/'), ('made', '')):
        for c, colour in (('red', (250, 10, 10)), ('blue', (10, 10, 250))):
            to = tmp_path/'data'/name/f'{split}{c}'
            to.mkdir(parents=True)
            for i in range(5):
                a = np.clip(np.array(colour)+rng.integers(-9, 9, (96, 96, 3)), 0, 255)
                Image.fromarray(a.astype(np.uint8)).save(to/f'{i}.png')
    p = smoke_params()
    sets = dict(photos=dict(type='imagefolder', input='photos', splits=dict(train='train', val='val', test='test')),
                made=dict(type='imagefolder', input='made', synthetic=True))
    p['study']['classes'] = ['red', 'blue']
    p['data'] = dict(root='data', image_size=96, channels=3, sets=sets)
    study = Study(tmp_path, p)
    for s in sets:
        build_set(study, s)
    out = dict(photos=dict(set='photos'), source=dict(set='made'),
               classes=[{'class': 'blue', 'ratio': .5, 'words': 'gains'}])
    [found] = class_pictures(study, out)
    for key in ('photos', 'added'):
        kind, data = found[key].split(';base64,')
        a = np.asarray(Image.open(io.BytesIO(base64.b64decode(data)))).astype(int)
        assert kind == 'data:image/jpeg' and a.shape == (64, 256, 3) and len(data) < 20_000
        assert a[..., 2].mean() > 200 and a[..., 0].mean() < 60
