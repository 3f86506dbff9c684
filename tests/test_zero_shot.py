"""Evaluation of CLIP models: what open_clip, its trainer and CLIP_benchmark give for the same images, laws that hold
for all features, and class names, captions and features that nobody should have."""
import itertools
from types import SimpleNamespace
import numpy as np
import open_clip
import open_clip_train.zero_shot
import pytest
import torch
from hypothesis import given, settings, strategies as st
from open_clip_train.train import get_clip_metrics
from synthscale.recipes import unpack_values
from synthscale.study import StudyError
from synthscale.train import measure, to_float
from synthscale.zero_shot import (class_weights, clip_score, image_features, image_text_retrieval, learned_scale,
                                  linear_probe, recall_by_chance, retrieval, text_features, zero_shot, zero_shot_logits)

some = settings(max_examples=25, deadline=None)
seeds = st.integers(0, 2**31)
NAMES = ['zero', 'one', 'two', 'three', 'four', 'five', 'six']
WAYS = 'image_to_text', 'text_to_image'

def random_clip(seed=0, bias=None):
    "A small open_clip model with random weights; its image tower is spread so that images are not all alike."
    torch.manual_seed(seed)
    vision = open_clip.CLIPVisionCfg(layers=2, width=32, head_width=16, patch_size=4, image_size=16)
    text = open_clip.CLIPTextCfg(context_length=16, width=32, heads=2, layers=2)
    net = open_clip.CLIP(24, vision, text, init_logit_bias=bias).eval()
    with torch.no_grad():
        net.logit_scale.fill_(2.)
    return SimpleNamespace(net=net, tokenizer=open_clip.SimpleTokenizer(context_length=16), pixels=to_float, size=16,
                           mean=(.5,)*3, std=(.5,)*3)

@pytest.fixture(scope='module')
def m():
    return random_clip()

@pytest.fixture(scope='module')
def data():
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (90, 16, 16, 3), dtype=np.uint8), rng.integers(0, len(NAMES), 90)

def unit(seed, n, d):
    x = np.random.default_rng(seed).normal(0, 1, (n, d)).astype(np.float32)
    return torch.nn.functional.normalize(torch.tensor(x), dim=-1)

# ---- zero-shot classes, as open_clip and its trainer have them

@pytest.mark.parametrize('ours, theirs', [('openai', open_clip.OPENAI_IMAGENET_TEMPLATES),
                                          (['a photo of a {c}.', 'the {name}'], ['a photo of a {}.', 'the {}'])])
def test_class_weights_are_open_clips(m, ours, theirs):
    want = open_clip.build_zero_shot_classifier(m.net, m.tokenizer, NAMES, theirs)
    assert (class_weights(m, NAMES, ours)-want).abs().max() < 1e-6
    assert (class_weights(m, NAMES, ours, batch=2)-want).abs().max() < 1e-6

def number(a):
    "An array of one number as that number: since NumPy 2.4 `float` refuses those with a dimension, and both fail."
    return float(np.asarray(a).reshape(()))

def test_accuracies_are_those_of_the_trainer(m, data, monkeypatch):
    monkeypatch.setattr(open_clip_train.zero_shot, 'float', number, raising=False)
    images, labels = data
    w = class_weights(m, NAMES, 'simple')
    loader = [(to_float(images[i:i+40]), torch.tensor(labels[i:i+40])) for i in range(0, 90, 40)]
    args = SimpleNamespace(device='cpu', precision='fp32', batch_size=40)
    top1, top5 = open_clip_train.zero_shot.run(m.net, w, loader, args)
    r = zero_shot(m, images, labels, NAMES, 'simple', batch=32)
    assert abs(r['top1']-top1) < 1e-6 and abs(r['top5']-top5) < 1e-6
    assert 0 < top1 < top5 < 1
    out = zero_shot_logits(m, images, w)
    accuracy = open_clip_train.zero_shot.accuracy
    assert accuracy(out, torch.tensor(labels), (1, 5)) == [round(90*r['top1']), round(90*r['top5'])]

def test_logits_are_those_of_the_models_own_forward(data):
    images, labels = data
    for m in (random_clip(3), random_clip(3, bias=-4.)):
        tokens = m.tokenizer([f'a {c}' for c in NAMES])
        with torch.no_grad():
            f, t, scale, *bias = m.net(to_float(images), tokens)
        want = scale*f @ t.T+(bias[0] if bias else 0)
        got = zero_shot_logits(m, images, class_weights(m, NAMES, 'a {}'))
        assert (got-want).abs().max() < 2e-5 and got.dtype == torch.float32
        assert learned_scale(m)[1] == (-4. if bias else 0)
        loss = torch.nn.functional.cross_entropy(want.double(), torch.tensor(labels)).item()
        assert abs(measure(got, labels, 7)['loss']-loss) < 1e-6

def test_batches_do_not_matter(m, data):
    images = data[0]
    a, b = image_features(m, images, 7), image_features(m, images, 256)
    assert (a-b).abs().max() < 1e-6
    texts = [f'a {c}' for c in NAMES]*3
    assert (text_features(m, texts, 2)-text_features(m, texts, 64)).abs().max() < 1e-6

# ---- retrieval, as the trainer and CLIP_benchmark have it

@pytest.mark.parametrize('n, d', [(50, 8), (400, 24), (1, 3)])
def test_strict_retrieval_is_that_of_the_trainer(n, d):
    x, t = unit(0, n, d), unit(1, n, d)
    t = torch.nn.functional.normalize(t+1.5*x, dim=-1)
    ours, theirs = retrieval(x, t, np.arange(n), scale=10., strict=True), get_clip_metrics(x, t, 10.)
    for k, v in theirs.items():
        assert abs(ours[k]-v) < 1e-6, k

def test_strict_retrieval_of_a_model_is_that_of_the_trainer(m, data):
    images = data[0]
    captions = [f'{a} {b} {c}' for a, b, c in itertools.product(NAMES, NAMES, NAMES)][:90]
    ours = image_text_retrieval(m, images, captions)
    theirs = get_clip_metrics(image_features(m, images), text_features(m, captions), m.net.logit_scale.exp())
    for k, v in theirs.items():
        assert abs(ours[k]-v) < 1e-6, k
    assert ours['n_shared_texts'] == 0

def test_contrastive_loss_is_open_clips():
    x, t = unit(0, 64, 8), unit(1, 64, 8)
    want = open_clip.ClipLoss()(x.double(), t.double(), 7.).item()
    assert abs(retrieval(x, t, np.arange(64), scale=7.)['loss']-want) < 1e-6

def recall_at_k(scores, positive, k):
    "The share of queries with a right candidate among the first k: CLIP_benchmark's recall, above 0 or not."
    top = torch.topk(scores, k, dim=1).indices
    return positive.gather(1, top).any(1).float().mean().item()

def several_captions(seed, n=60, d=8):
    rng = np.random.default_rng(seed)
    of = np.sort(np.concatenate([np.arange(n), rng.integers(0, n, 3*n)]))
    x = unit(seed, n, d)
    return x, torch.nn.functional.normalize(unit(seed+1, len(of), d)+.7*x[of], dim=-1), of

def test_several_captions_are_counted_as_clip_benchmark_counts():
    x, t, of = several_captions(0)
    scores = t @ x.T
    positive = torch.zeros_like(scores, dtype=torch.bool)
    positive[torch.arange(len(of)), of] = True
    r = retrieval(x, t, of)
    for k in (1, 5, 10):
        assert abs(r[f'text_to_image_R@{k}']-recall_at_k(scores, positive, k)) < 1e-6
        assert abs(r[f'image_to_text_R@{k}']-recall_at_k(scores.T, positive.T, k)) < 1e-6
    theirs = pytest.importorskip('clip_benchmark.metrics.zeroshot_retrieval', reason='clip_benchmark is not installed')
    for k in (1, 5, 10):
        for way, s, p in (('text_to_image', scores, positive), ('image_to_text', scores.T, positive.T)):
            want = (theirs.recall_at_k(s, p, k) > 0).float().mean().item()
            assert abs(r[f'{way}_R@{k}']-want) < 1e-6

# ---- laws

@some
@given(seeds, st.integers(2, 25), st.integers(1, 6), st.integers(1, 5), st.booleans())
def test_retrieval_does_not_depend_on_the_order_of_candidates(seed, n, d, different, strict):
    "Also with equal images, equal texts and ties."
    rng = np.random.default_rng(seed)
    of = rng.permutation(np.concatenate([np.arange(n), rng.integers(0, n, n)]))
    captions = [f'text {i}' for i in rng.integers(0, different, 2*n)]
    x = rng.integers(-1, 2, (n, d))+.1
    t = rng.integers(-1, 2, (different, d))[[int(c.split()[1]) for c in captions]]+.1
    a = retrieval(x, t, of, captions, 3., strict)
    p, q = rng.permutation(n), rng.permutation(2*n)
    b = retrieval(x[p], t[q], np.argsort(p)[of[q]], [captions[i] for i in q], 3., strict)
    for k in a:
        if not isinstance(a[k], float): continue
        assert a[k] == pytest.approx(b[k], abs=1e-9), k

@some
@given(seeds, st.integers(2, 30), st.integers(1, 8), st.booleans())
def test_retrieval_laws(seed, n, d, strict):
    rng = np.random.default_rng(seed)
    x, t, of = several_captions(seed % 1000, n, d)
    captions = [f'text {i}' for i in rng.integers(0, 2*n, len(of))]
    r = retrieval(x, t, of, captions, 5., strict)
    own = retrieval(x, t, of, captions, 5., True)
    for way in WAYS:
        assert 0 <= r[f'{way}_R@1'] <= r[f'{way}_R@5'] <= r[f'{way}_R@10'] <= 1
        assert r[f'{way}_mean_rank'] >= 1 and r[f'{way}_loss'] >= 0
        for k in ('R@1', 'R@5', 'R@10', 'chance_R@1'):
            assert r[f'{way}_{k}'] >= own[f'{way}_{k}']-1e-12         # more is right, never less is found
        assert r[f'{way}_loss'] <= own[f'{way}_loss']+1e-9
        m = len(x) if way == 'image_to_text' else len(t)
        for k in ('R@1', 'loss'):
            assert abs(unpack_values(r['each'][f'{way}_{k}'], m).mean()-r[f'{way}_{k}']) < 1e-3*(1+r[f'{way}_{k}'])
    scaled = retrieval(3*x, t*torch.rand(len(t), 1).add(.1), of, captions, 5., strict)
    assert scaled['text_to_image_R@5'] == pytest.approx(r['text_to_image_R@5'], abs=1e-9)

@some
@given(st.integers(1, 60), st.data())
def test_chance_is_what_random_orders_give(n, draw):
    right, k = draw.draw(st.integers(1, n)), draw.draw(st.integers(0, n))
    inside = np.arange(n) < k
    rng = np.random.default_rng(0)
    tries = np.mean([inside[rng.permutation(n)[:right]].any() for _ in range(400)])
    assert abs(recall_by_chance(k, n, right)-tries) < .13
    assert recall_by_chance(k, n, 1) == pytest.approx(k/n, abs=1e-9)

@some
@given(seeds, st.integers(1, 40), st.integers(1, 6))
def test_a_network_that_sees_nothing_is_at_chance(seed, n, different):
    captions = [f'text {i}' for i in np.random.default_rng(seed).integers(0, different, n)]
    r = retrieval(np.ones((n, 4)), np.ones((n, 4)), np.arange(n), captions, 9.)
    for way, k in itertools.product(WAYS, ('R@1', 'R@5', 'R@10', 'loss')):
        assert r[f'{way}_{k}'] == pytest.approx(r[f'{way}_chance_{k}'], abs=1e-6)

@some
@given(seeds, st.integers(1, 30), st.integers(1, 8))
def test_clip_score_is_by_pairs_and_between_0_and_100(seed, n, d):
    x, t = unit(seed, n, d), unit(seed+1, n, d)
    r = clip_score(x, t)
    assert 0 <= r['clip_score'] <= 100+1e-6 and len(r['each']) == n
    want = [100*max(float(a.double() @ b.double()), 0) for a, b in zip(x, t)]
    assert np.allclose(r['each'], want, atol=1e-4)
    p = np.random.default_rng(seed).permutation(n)
    assert clip_score(x[p], t[p])['clip_score'] == pytest.approx(r['clip_score'])
    assert clip_score(x, x)['clip_score'] == pytest.approx(100)

# ---- linear probe

def blobs(seed=0, n=240, d=6, classes=3):
    rng = np.random.default_rng(seed)
    y = np.tile(np.arange(classes), n//classes)
    return rng.normal(0, 1, (n, d))+1.2*np.eye(classes, d)[y], y

def probed(x, y, **more):
    return linear_probe(x[:120], y[:120], x[120:180], y[120:180], dict(test=(x[180:], y[180:])), **more)

def test_the_probe_is_at_the_minimum_of_its_loss():
    "The gradient of mean cross-entropy + l2/2 |W|^2 by autograd is 0 at what it returns."
    from synthscale.zero_shot import _fit_probe
    x, y = blobs()
    for l2 in (1., 1e-2, 1e-4):
        z = _fit_probe(x, y, l2, 2000)[0](np.eye(6))-_fit_probe(x, y, l2, 2000)[0](np.zeros((1, 6)))
        b = _fit_probe(x, y, l2, 2000)[0](np.zeros((1, 6)))
        w, b = z.clone().requires_grad_(), b.clone().requires_grad_()
        loss = torch.nn.functional.cross_entropy(torch.tensor(x) @ w+b, torch.tensor(y))+l2/2*(w**2).sum()
        loss.backward()
        assert max(w.grad.abs().max(), b.grad.abs().max()) < 1e-4

def test_the_probe_does_not_depend_on_units_and_order_of_features():
    x, y = blobs()
    a = probed(x, y)
    b = probed(7+100*x[:, ::-1], y)
    assert a['l2'] == b['l2'] and abs(a['splits']['test']['loss']-b['splits']['test']['loss']) < 1e-4
    assert a == probed(x, y)
    assert a['splits']['test']['top1'] > .5 and a['tried'][a['l2']] == min(a['tried'].values())

def test_the_probe_of_two_classes_and_of_noise():
    x, y = blobs(classes=2)
    assert probed(x, y)['splits']['test']['top1'] > .7
    noise = np.random.default_rng(0).normal(0, 1, x.shape)
    r = probed(noise, y)
    assert r['l2'] >= .1 and abs(r['splits']['validation']['loss']-np.log(2)) < .1

@pytest.mark.parametrize('change, message', [
    (dict(train_y=np.zeros(120, int)), 'no image of class 1'), (dict(val_y=np.full(60, 3)), 'validation: labels is'),
    (dict(val_x=np.ones((60, 5))), 'validation: width is 5'), (dict(train_x=np.full((120, 6), np.nan)), 'not finite'),
    (dict(tests=dict(far=(np.ones((3, 6)), [0, 1]))), 'far: shapes'), (dict(n_classes=4), 'no image of class 3')])
def test_the_probe_refuses(change, message):
    x, y = blobs()
    fine = dict(train_x=x[:120], train_y=y[:120], val_x=x[120:180], val_y=y[120:180], tests={})
    with pytest.raises(StudyError, match=message):
        linear_probe(**fine | change)

# ---- what nobody should have

def test_features_that_are_no_numbers_are_named(m, data):
    broken = random_clip()
    with torch.no_grad():
        broken.net.visual.proj[0, 0] = float('nan')
    with pytest.raises(StudyError, match='image features are not finite in 90 of 90 rows'):
        zero_shot(broken, *data, NAMES, '{}')
    x = unit(0, 10, 4).numpy()
    x[3, 1] = np.inf
    for f in (lambda: clip_score(x, x), lambda: retrieval(x, x, np.arange(10))):
        with pytest.raises(StudyError, match='image features are not finite, or all 0, in 1 of 10 rows.*row 3'):
            f()

@pytest.mark.parametrize('change, message', [
    (dict(names=NAMES[:6]), 'there are 6 class names'), (dict(names=[*NAMES[:6], '']), 'class name 6'),
    (dict(labels=np.arange(5)), 'number of labels is 5'), (dict(templates=[]), 'there are none'),
    (dict(templates='a photo'), 'a place for the name'), (dict(labels=np.full(90, -1)), 'a label is -1')])
def test_zero_shot_refuses(m, data, change, message):
    with pytest.raises(StudyError, match=message):
        zero_shot(m, **dict(images=data[0], labels=data[1], names=NAMES, templates='{}') | change)

@pytest.mark.parametrize('captions, message', [
    (['a']*89, 'number of captioned images is 89'), (['a']*89+['a\n\nb'], 'image 89 has an empty caption among 3'),
    (['a']*89+[''], 'image 89 has no caption')])
def test_captions_that_are_refused(m, data, captions, message):
    with pytest.raises(StudyError, match=message):
        image_text_retrieval(m, data[0], captions)
