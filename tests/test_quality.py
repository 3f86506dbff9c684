"""Metrics of image sets: what torch-fidelity gives, closed forms, laws that hold for all features, flat memory, and
what is done with features, classes and evaluators that nobody should have."""
import copy, json, shutil, tracemalloc
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings, strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric
from synthscale.data import build_set
from synthscale.feature_metrics import (bootstrap, check_features, frechet_distance, kernel_distance,
                                        kernel_distance_subsets, nearest_squares, neighbour_metrics, neighbour_squares)
from synthscale.quality import (class_distances, copies_of, distances, equal_parts, judged, looks, near, references,
                                score_set, share_interval)
from synthscale.shards import load_set
from synthscale.smoke import smoke_study
from synthscale.study import Study, StudyError

some = settings(max_examples=20, deadline=None)
seeds, widths = st.integers(0, 2**31), st.integers(1, 12)
sizes = st.integers(6, 60)

def clouds(seed, n=200, m=150, d=6):
    "Real and generated features that overlap in part, of unequal spread."
    rng = np.random.default_rng(seed)
    mix = np.eye(d)+.3*rng.normal(0, 1, (d, d))/d**.5
    return rng.normal(0, 1, (n, d)), 1/d**.5+rng.normal(0, .9, (m, d)) @ mix

def close(got, want, tol=1e-6):
    assert abs(got-want) <= tol*abs(want), (got, want)

# ---- what torch-fidelity gives

@pytest.mark.parametrize('n, m, d', [(200, 150, 6), (1500, 700, 64), (600, 600, 512)])
def test_frechet_distance_is_that_of_torch_fidelity(n, m, d):
    a, b = clouds(0, n, m, d)
    of = [fid_features_to_statistics(torch.from_numpy(x)) for x in (a, b)]
    close(frechet_distance(a, b), fid_statistics_to_metric(*of, False)['frechet_inception_distance'])

@pytest.mark.parametrize('n, d', [(50, 3), (700, 64), (1100, 512)])
def test_kernel_distance_is_one_subset_of_torch_fidelity(n, d):
    a, b = clouds(1, n, n, d)
    theirs = kid_features_to_metric(*map(torch.from_numpy, (a, b)), kid_subsets=1, kid_subset_size=n, verbose=False)
    close(kernel_distance(a, b), theirs['kernel_inception_distance_mean'])

def test_subsets_are_those_of_torch_fidelity():
    a, b = clouds(2, 300, 400, 8)
    theirs = kid_features_to_metric(*map(torch.from_numpy, (a, b)), kid_subsets=10, kid_subset_size=100, verbose=False)
    mean, sd = kernel_distance_subsets(a, b, subsets=10, size=100)
    close(mean, theirs['kernel_inception_distance_mean'])
    close(sd, theirs['kernel_inception_distance_std'])

@pytest.mark.parametrize('k', [1, 3, 5])
@pytest.mark.parametrize('n, m, d', [(300, 200, 4), (1200, 700, 64)])
def test_precision_and_recall_are_those_of_torch_fidelity(n, m, d, k):
    a, b = clouds(3, n, m, d)
    theirs = prc_features_to_metric(*map(torch.from_numpy, (b, a)), prc_neighborhood=k, verbose=False)   # real second
    ours = neighbour_metrics(a, b, k_precision_recall=k)
    assert 0 < min(ours['precision'], ours['recall']) < 1
    for metric in ('precision', 'recall'):
        close(ours[metric], theirs[metric])

def by_definition(real, generated, k=5):
    "Density and coverage as Naeem et al. (2020) define them, written out over all pairs."
    between = np.linalg.norm(real[:, None]-generated, axis=2)
    own = np.sort(np.linalg.norm(real[:, None]-real, axis=2), 1)[:, k]
    inside = between <= own[:, None]
    return inside.sum()/k/len(generated), inside.any(1).mean()

@given(seeds, sizes, sizes, widths)
@some
def test_density_and_coverage_follow_their_definition(seed, n, m, d):
    a, b = clouds(seed, n, m, d)
    got = neighbour_metrics(a, b)
    np.testing.assert_allclose((got['density'], got['coverage']), by_definition(a, b), rtol=1e-9)

# ---- closed forms

def exact(mean, sd, n=400):
    "Features whose sample mean and covariance, diagonal, are exactly these."
    x = np.random.default_rng(0).normal(0, 1, (n, len(mean)))
    q, _ = np.linalg.qr(x-x.mean(0))
    return q*np.sqrt(n-1)*sd+mean

@given(seeds, widths)
@some
def test_frechet_distance_of_two_normal_distributions(seed, d):
    m, o, s, t = np.random.default_rng(seed).uniform(.1, 3, (4, d))
    close(frechet_distance(exact(m, s), exact(o, t)), ((m-o)**2).sum()+((s-t)**2).sum(), 1e-9)

@given(seeds, st.integers(12, 60), widths)
@some
def test_a_set_is_at_no_distance_from_itself(seed, n, d):
    a, _ = clouds(seed, n, 1, d)
    assert frechet_distance(a, a) < 1e-12*(a**2).sum()
    got = neighbour_metrics(a, a)
    assert [got[k] for k in ('precision', 'recall', 'coverage')] == [1, 1, 1] and abs(got['density']-1.2) < 1e-12

def test_so_is_a_set_that_repeats_itself():
    "With radii of zero a rounding error would decide."
    a = np.repeat(1e3+np.random.default_rng(0).normal(0, 1, (20, 8)), 10, 0)
    got = neighbour_metrics(a, a[::-1])
    assert [got[k] for k in ('precision', 'recall', 'coverage')] == [1, 1, 1]

def test_sets_that_do_not_meet():
    a, b = clouds(0)
    assert neighbour_metrics(a, b+100) == dict(precision=0, recall=0, density=0, coverage=0)
    close(frechet_distance(a, a+10), 600, 1e-9)

@given(seeds, st.integers(2, 5), st.integers(2, 30), widths)
@some
def test_the_kernel_distance_of_classes_is_the_one_over_their_pairs(seed, classes, each, d):
    a, b = clouds(seed, classes*each, classes*each, d)
    of = np.arange(classes*each) % classes

    def mean(x):
        k = (x @ x.T/d+1)**3
        means = [[k[np.ix_(of == p, of == q)].mean() if p != q else
                  (k[np.ix_(of == p, of == p)].sum()-k.diagonal()[of == p].sum())/each/(each-1)
                  for p in range(classes)] for q in range(classes)]
        return np.mean(means)
    want = mean(a)+mean(b)-2*((a @ b.T/d+1)**3).mean()
    assert abs(kernel_distance(a, b, (of, of))-want) < 1e-9*(mean(a)+mean(b))

# ---- laws that hold for all features

@given(seeds, sizes, sizes, widths)
@some
def test_distances_are_symmetric(seed, n, m, d):
    a, b = clouds(seed, n, m, d)
    close(frechet_distance(a, b), frechet_distance(b, a), 1e-9)
    assert abs(kernel_distance(a, b)-kernel_distance(b, a)) < 1e-9
    one, other = neighbour_metrics(a, b), neighbour_metrics(b, a)
    assert one['precision'] == other['recall'] and one['recall'] == other['precision']

def every(a, b):
    "All metrics, in one array."
    return np.array([frechet_distance(a, b), kernel_distance(a, b), *neighbour_metrics(a, b).values()])

@given(seeds, sizes, st.integers(2, 12))
@some
def test_the_order_of_images_and_a_rotation_change_nothing(seed, n, d):
    a, b = clouds(seed, n, n, d)
    rng, want = np.random.default_rng(seed), every(a, b)
    turn, _ = np.linalg.qr(rng.normal(0, 1, (d, d)))
    np.testing.assert_allclose(every(rng.permutation(a), rng.permutation(b)), want, rtol=1e-8, atol=1e-9)
    np.testing.assert_allclose(every(a @ turn, b @ turn), want, rtol=1e-8, atol=1e-9)

@given(seeds, st.floats(-50, 50), st.floats(.1, 10))
@some
def test_a_shift_and_a_scale_of_all_features_change_only_what_they_should(seed, shift, scale):
    a, b = clouds(seed, 60, 60, 4)
    close(frechet_distance(a*scale+shift, b*scale+shift), frechet_distance(a, b)*scale**2, 1e-8)
    assert neighbour_metrics(a*scale+shift, b*scale+shift) == neighbour_metrics(a, b)

@given(seeds, st.integers(1, 1200), st.integers(1, 700), widths)
@some
def test_nearest_distances_are_those_of_all_pairs(seed, n, m, d):
    a, b = clouds(seed, n, m, d)
    pairs = ((a[:, None]-b)**2).sum(2)
    np.testing.assert_allclose(nearest_squares(a, b), pairs.min(1), atol=1e-9)
    own = ((a[:, None]-a)**2).sum(2)
    np.fill_diagonal(own, np.inf)
    np.testing.assert_allclose(neighbour_squares(a, 2), np.sort(np.c_[own, [[np.inf]]*n], 1)[:, :2], atol=1e-9)
    own[np.triu_indices(n)] = np.inf
    np.testing.assert_allclose(nearest_squares(a), own.min(1), atol=1e-9)

# ---- memory

def most_memory(metric, n):
    "The most bytes that a metric of n images holds beyond its input."
    a, b = clouds(0, n, n, 8)
    tracemalloc.start()
    try:
        metric(a, b)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()

@pytest.mark.parametrize('metric', [frechet_distance, kernel_distance, neighbour_metrics])
def test_memory_is_flat(metric):
    few, many = (most_memory(metric, n) for n in (2000, 8000))
    table, features = 8000**2*8, 8000*8*8
    assert many < table/20 and many-few < 8*features, (few, many)

# ---- intervals

def test_the_interval_of_a_mean_is_the_usual_one():
    x = np.random.default_rng(0).normal(3, 2, (501, 1))
    value, lo, hi = bootstrap(np.mean, x, n_boot=2000)
    assert value == x.mean() and abs((hi-lo)/2/(1.96*x.std(ddof=1)/501**.5)-1) < .05

def test_strata_keep_the_spread_between_classes_out():
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1], 200)
    x = 10*labels+rng.normal(0, 1, 400)
    _, lo, hi = bootstrap(np.mean, x, strata=[labels])
    _, low, high = bootstrap(np.mean, x)
    assert .15 < hi-lo < .25 and high-low > 4*(hi-lo)

def test_other_seeds_give_other_halves_and_none_gives_no_interval():
    a, b = clouds(0)
    first, again, other = (bootstrap(kernel_distance, a, b, n_boot=20, seed=s) for s in (0, 0, 1))
    assert first == again != other and first[0] == other[0]
    assert np.isnan(bootstrap(kernel_distance, a, b, n_boot=0)[1:]).all()
    wider = bootstrap(kernel_distance, a, b, n_boot=20, level=.99)
    assert wider[2]-wider[1] > 1.3*(first[2]-first[1])

@given(st.integers(0, 400), st.integers(1, 400))
@some
def test_the_interval_of_a_share_is_that_of_statsmodels(k, n):
    from statsmodels.stats.proportion import proportion_confint
    k = min(k, n)
    np.testing.assert_allclose(share_interval(k/n, n), proportion_confint(k, n, method='wilson'), atol=1e-9)

# ---- bad input

def with_nan(x):
    "The features, one of them NaN."
    x = x.copy()
    x[3, 1] = np.nan
    return x

A, B = clouds(0)

@pytest.mark.parametrize('metric', [frechet_distance, kernel_distance, neighbour_metrics, kernel_distance_subsets])
@pytest.mark.parametrize('real, generated, message', [
    (A, with_nan(B), 'the generated features are not finite in 1 of 150 rows, the first is row 3'),
    (with_nan(A), B, 'the real features are not finite in 1 of 200 rows'),
    (A, np.where(B > 2, np.inf, B), 'the generated features are not finite'),
    (A, B[:, :4], 'width of the generated features is 4: expected that of the real ones, 6'),
    (A[0], B, r'shape of the real features is \(6,\): expected images x features'),
    (A[:, :0], B[:, :0], 'expected images x features')])
def test_bad_features_are_an_error(metric, real, generated, message):
    with pytest.raises(StudyError, match=message):
        metric(real, generated)

@pytest.mark.parametrize('n', [0, 1])
def test_too_few_images_are_undefined(n):
    for a, b in ((A[:n], B), (A, B[:n])):
        assert np.isnan([frechet_distance(a, b), kernel_distance(a, b), neighbour_metrics(a, b)['precision']]).all()

def test_k_images_are_too_few_for_k_neighbours():
    assert np.isnan([*neighbour_metrics(A[:3], B).values()]).all()
    got = neighbour_metrics(A[:4], B)
    assert got['precision'] >= 0 and np.isnan(got['density'])
    assert not np.isnan([*neighbour_metrics(A[:6], B[:4]).values()]).any()

@pytest.mark.parametrize('call, message', [
    (lambda: neighbour_metrics(A, B, k_precision_recall=0), 'nearest neighbours is 0: expected at least 1'),
    (lambda: kernel_distance_subsets(A, B), 'size of the subsets is 1000: expected from 2 to 150'),
    (lambda: bootstrap(np.mean, A, n_boot=1), 'halves is 1: expected at least 2, or 0'),
    (lambda: bootstrap(np.mean, A, level=95), 'level is 95: expected between 0 and 1')])
def test_a_wrong_number_is_an_error(call, message):
    with pytest.raises(StudyError, match=message):
        call()

def test_float32_features_are_taken_as_they_are():
    a, b = (x.astype(np.float32) for x in (A, B))
    assert check_features(a, b)[0].dtype == np.float64
    assert frechet_distance(a, b) == frechet_distance(a.astype(float), b.astype(float))

# ---- duplicates

def pictures(n, side, seed=0):
    "Smooth grey images, all different."
    rng = np.random.default_rng(seed)
    coarse = rng.integers(10, 246, (n, 5, 5)).astype(np.uint8)
    return np.stack([np.asarray(Image.fromarray(a).resize((side, side)))[..., None] for a in coarse])

@pytest.mark.parametrize('side', [8, 32])
def test_near_copies_are_found_at_both_sizes(side):
    images = pictures(60, side)
    changed = np.clip(images+np.random.default_rng(1).integers(-3, 4, (60, 1, 1, 1)), 0, 255).astype(np.uint8)
    assert near(looks(changed), looks(images)).all()
    assert not near(looks(images)).any() and not near(looks(images), looks(pictures(60, side, 1))).any()
    assert near(looks(np.concatenate([images, changed]))).tolist() == [False]*60+[True]*60

# ---- of a study

@pytest.fixture(scope='module')
def scored(tmp_path_factory):
    "A smoke study with its sets and evaluators."
    d = tmp_path_factory.mktemp('quality')/'study'
    shutil.copytree(smoke_study('data', 'evaluators'), d)
    return d

def changed(folder, evaluated=None, sets=None, **quality):
    "The study with other keys under quality, None for without, and under classify.eval."
    raw = copy.deepcopy(Study(folder).raw)
    raw['quality'] = {k: v for k, v in (raw['quality'] | quality).items() if v is not None}
    raw['quality']['sets'] |= sets or {}
    raw['classify']['eval'] |= evaluated or {}
    return Study(folder, raw)

def test_the_table_of_a_set(scored):
    study = changed(scored, bootstrap=10)
    q = score_set(study, 'rendered')
    assert list(q)[:5] == ['set', 'class', 'metric', 'value', 'n']
    assert len(q) == 11*q.metric.nunique() and not q.duplicated(['class', 'metric']).any()
    pd.testing.assert_frame_equal(q, score_set(study, 'rendered'))
    read = pd.read_csv(study.path('runs', 'quality', 'rendered', 'quality.csv'), keep_default_na=False, na_values={
        'value': '', 'ci_lo': '', 'ci_hi': ''})
    pd.testing.assert_frame_equal(read, q)
    t = q[q['class'] == 'all'].set_index('metric')
    assert t.network['precision'] == t.network['diversity'] == study.quality.real_evaluator
    assert t.reference['kernel_distance'] == 'digits: train' and t.reference['duplicates_test'] == 'digits: test, ood'
    compared = q[q.reference == 'digits: train']
    assert (compared[compared.metric.isin(distances(A[:9], B[:9], [0]*9))].eval('n == n_reference')).all()
    undefined = q[q.value.isna()]
    assert len(undefined) and set(undefined.note) == {'too few images'}
    assert set(q[q.value.notna() & q.ci_lo.isna()].note) == {'grows with n: no interval',
                                                             'too few images for an interval'}

def test_intervals_can_be_left_out(scored):
    q = score_set(changed(scored, bootstrap=0), 'rendered').query("metric == 'kernel_distance'")
    assert q.value.notna().all() and q.ci_lo.isna().all() and (q.note == '').all()

def test_the_reference_is_not_compared_with_itself(scored):
    study = changed(scored, bootstrap=0, sets=dict(digits=dict(split='train')))
    q = score_set(study, 'digits')
    own = q[q.metric.isin(['kernel_distance', 'recall'])]
    assert own.value.isna().all() and set(own.note) == {'the reference itself'}
    assert set(q[q.metric == 'near_duplicates_train'].note) == {'no other train images'}
    assert q[q.metric == 'duplicates_test'].value.notna().all()

def test_a_set_without_training_images_is_no_reference(scored, tmp_path):
    shutil.copytree(scored, tmp_path/'study')
    where = dict(set='rendered', test_splits=['held_out'], in_domain_set='rendered')
    study = changed(tmp_path/'study', where, bootstrap=0)
    assert references(study) == {'real': ('rendered', 'train')}
    study.raw['data']['sets']['rendered']['splits'] = dict(held_out=80)
    shutil.rmtree(study.set_dir('rendered'))
    study = Study(study.dir, study.raw)
    build_set(study, 'rendered')
    q = score_set(study, 'digits')
    assert set(q[q.metric == 'recall'].note) == {'set rendered has no split train'} and q.value.notna().any()

def test_training_images_are_found_in_a_set(scored):
    study = Study(scored)
    train = load_set(study.set_dir('digits'), 'train').images[:30]
    exact, like, n = copies_of(study, ['train'], train)
    assert exact.all() and like.all() and n == 847
    exact, like, _ = copies_of(study, ['train'], np.clip(train.astype(int)+3, 0, 255).astype(np.uint8))
    assert not exact.any() and like.all()

def test_an_evaluator_of_other_classes_is_an_error(scored):
    study, file = Study(scored), scored/'evaluators'/'real_classifier'/'config.json'
    kept = file.read_text()
    try:
        config = json.loads(kept)
        file.write_text(json.dumps(config | dict(classes=config['classes'][::-1])))
        with pytest.raises(StudyError, match='real_classifier/config.json: classes is .*nine.*: expected the classes'):
            score_set(study, 'rendered')
    finally:
        file.write_text(kept)

def test_an_evaluator_that_has_diverged_is_an_error(scored):
    study, file = changed(scored, bootstrap=0), scored/'evaluators'/'real_classifier'/'model.safetensors'
    kept = file.read_bytes()
    try:
        weights = load_file(file)
        save_file({k: v*np.nan if v.is_floating_point() else v for k, v in weights.items()}, file)
        with pytest.raises(StudyError, match='the real features are not finite in 847 of 847 rows'):
            score_set(study, 'rendered')
    finally:
        file.write_bytes(kept)

def test_without_the_real_evaluator_there_are_no_distances(scored):
    q = score_set(changed(scored, bootstrap=0, real_evaluator=None), 'rendered')
    assert set(q.metric) == {'recognized_in_domain', 'recognizability_in_domain', 'duplicate_rate',
                             'near_duplicate_rate', 'duplicates_train', 'near_duplicates_train', 'duplicates_test',
                             'near_duplicates_test'}

def test_a_class_of_few_images_is_undefined_and_the_rest_is_not():
    rng = np.random.default_rng(0)
    labels = np.r_[np.zeros(40, int), np.ones(40, int), [2]]
    a, b = rng.normal(0, 1, (2, 81, 3))
    found, n = class_distances(a, labels, b, labels, 4, 1000, 5, 0)
    assert n.tolist() == [40, 40, 1, 0, 81]
    assert np.isnan(found['precision'][0]).tolist() == [False, False, True, True, False]

@given(seeds, st.integers(1, 80))
@some
def test_equal_parts_are_equal(seed, most):
    rng = np.random.default_rng(seed)
    a, b = rng.integers(0, 5, 60), rng.integers(2, 8, 40)
    i, j = equal_parts(a, b, most)
    assert (a[i] == b[j]).all() and len(set(i)) == len(i) <= most and len(set(j)) == len(j)

def test_what_the_evaluators_say(scored):
    study = Study(scored)
    val = load_set(study.set_dir('digits'), 'val')
    found = judged(study, 'real', val.images)
    assert found['network'] == 'real_classifier' and found['feats'].shape == (150, len(found['scale']))
