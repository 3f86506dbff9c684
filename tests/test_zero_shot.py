"""Evaluation of CLIP models: what open_clip, its trainer and CLIP_benchmark give for the same images, laws that hold
for all features, and class names, captions and features that nobody should have."""
import copy, io, itertools, json, sys, tarfile
from pathlib import Path
from types import SimpleNamespace
import numpy as np
import open_clip
import open_clip_train.zero_shot
import pytest
import torch
from hypothesis import given, settings, strategies as st
from open_clip_train.train import get_clip_metrics
from PIL import Image
from safetensors.torch import save_file
from synthscale.recipes import unpack_values
from synthscale.clip_scores import score_captions
from synthscale.shards import encode_png, load_set, subset
from synthscale.smoke import smoke_study
from synthscale.study import Study, StudyError
from synthscale.train import measure, to_float
from synthscale.zero_shot import (caption_scores, class_names, class_weights, clip_score, downstream, downstream_set,
                                  evaluate_wds, image_features, image_text_retrieval, learned_scale, linear_probe,
                                  load_open_clip, read_wds, recall_by_chance, retrieval, text_features, write_wds,
                                  zero_shot, zero_shot_logits)

some = settings(max_examples=25, deadline=None)
seeds = st.integers(0, 2**31)
NAMES = ['zero', 'one', 'two', 'three', 'four', 'five', 'six']
WAYS = 'image_to_text', 'text_to_image'

VISION = dict(layers=2, width=32, head_width=16, patch_size=4, image_size=16)
CONFIG = dict(embed_dim=24, vision_cfg=VISION, text_cfg=dict(context_length=16, width=32, heads=2, layers=2))

def random_clip(seed=0, bias=None, images=None):
    """A small open_clip model with random weights. Its image features are centred on some images: in a random network
    nearly all of a feature is common to all images, and one class would be named for all of them."""
    torch.manual_seed(seed)
    net = open_clip.CLIP(*CONFIG.values(), init_logit_bias=bias).eval()
    x = torch.randn(64, 3, 16, 16) if images is None else to_float(images)
    seen = []
    hook = net.visual.ln_post.register_forward_hook(lambda module, given, out: seen.append(out.mean(0)))
    with torch.no_grad():
        net.visual(x)
        hook.remove()
        net.visual.ln_post.bias -= seen[0][0] if seen[0].ndim == 2 else seen[0]
        net.logit_scale.fill_(2.)
    return SimpleNamespace(net=net, tokenizer=open_clip.SimpleTokenizer(context_length=16), pixels=to_float, size=16,
                           mean=(.5,)*3, std=(.5,)*3)

@pytest.fixture(scope='module')
def data():
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (90, 16, 16, 3), dtype=np.uint8), rng.integers(0, len(NAMES), 90)

@pytest.fixture(scope='module')
def m(data):
    return random_clip(images=data[0])

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
    assert 0 < top1 < top5 < 1 and len(set(zero_shot_logits(m, images, w).argmax(1).tolist())) > 3
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

# ---- CLIP_benchmark's sets

def saved_clip(folder, net):
    "A model as a folder of open_clip."
    folder.mkdir()
    half = dict(mean=[.5]*3, std=[.5]*3)
    (folder/'open_clip_config.json').write_text(json.dumps(dict(model_cfg=CONFIG, preprocess_cfg=half)))
    save_file(net.state_dict(), folder/'open_clip_model.safetensors')
    return folder

@pytest.fixture(scope='module')
def sets(tmp_path_factory):
    "A study's digits and captioned digits in CLIP_benchmark's layout, and a model that tells its images apart."
    study, root = Study(smoke_study('data')), tmp_path_factory.mktemp('wds')
    small = load_set(study.set_dir('digits'), 'test').images
    net = random_clip(1, images=small.repeat(2, 1).repeat(2, 2).repeat(3, 3)).net
    saved_clip(root/'model', net)
    write_wds(study, 'digits', 'test', root/'digits', ['a photo of the number {}.', '{name}'], shard_size=130)
    write_wds(study, 'rendered', 'held_out', root/'captions', kind='retrieval', shard_size=30)
    return root

def clip_benchmark(root, name, monkeypatch, *more):
    "The numbers of CLIP_benchmark's own command, in this process."
    cli = pytest.importorskip('clip_benchmark.cli', reason='clip_benchmark is not installed')
    from clip_benchmark.metrics import zeroshot_classification
    monkeypatch.setattr(zeroshot_classification, 'float', number, raising=False)
    out = root/'out.json'
    line = ['clip_benchmark', 'eval', '--dataset', f'wds/{name}', '--dataset_root', str(root/name), '--pretrained', '',
            '--model', f"local-dir:{root/'model'}", '--output', str(out), '--no_amp', '--num_workers', '0', *more]
    monkeypatch.setattr(sys, 'argv', line)
    cli.main()
    return json.loads(out.read_text())['metrics']

def test_clip_benchmark_gives_our_numbers_of_our_classes(sets, monkeypatch):
    theirs = clip_benchmark(sets, 'digits', monkeypatch)
    r = evaluate_wds(load_open_clip(sets/'model'), read_wds(sets/'digits'), batch=64)
    for k, v in dict(top1='acc1', top5='acc5', mean_per_class_recall='mean_per_class_recall').items():
        assert abs(r[k]-theirs[v]) < 1e-6
    assert sum(v > 0 for v in r['class_recall']) > 2

def test_clip_benchmark_gives_our_numbers_of_our_captions(sets, monkeypatch):
    "One caption an image, of which some are equal: a tie, which CLIP_benchmark breaks in one way and we on average."
    more = '--task', 'zeroshot_retrieval', '--recall_k', '1', '5', '10'
    theirs = clip_benchmark(sets, 'captions', monkeypatch, *more)
    r = evaluate_wds(load_open_clip(sets/'model'), read_wds(sets/'captions'))
    ties = r['n_shared_texts']/r['n_texts']
    for k in (1, 5, 10):
        assert abs(r[f'text_to_image_R@{k}']-theirs[f'image_retrieval_recall@{k}']) < 1e-6      # images are no ties
        assert abs(r[f'image_to_text_R@{k}']-theirs[f'text_retrieval_recall@{k}']) < ties

def test_clip_benchmark_gives_our_numbers_of_several_captions(sets, data, monkeypatch):
    words = [' '.join(w) for w in itertools.product(NAMES, NAMES, NAMES)]
    texts = ['\n'.join(words[3*i:3*i+1+i % 3]).encode() for i in range(90)]
    samples = [('', dict(png=encode_png(a), txt=t)) for a, t in zip(data[0], texts)]
    their_set(sets/'several', samples, dataset_type='retrieval')
    theirs = clip_benchmark(sets, 'several', monkeypatch, '--task', 'zeroshot_retrieval', '--recall_k', '1', '5', '10')
    r = evaluate_wds(load_open_clip(sets/'model'), read_wds(sets/'several'))
    assert r['n_texts'] == 180 and r['n_shared_texts'] == 0
    for k in (1, 5, 10):
        assert abs(r[f'text_to_image_R@{k}']-theirs[f'image_retrieval_recall@{k}']) < 1e-6
        assert abs(r[f'image_to_text_R@{k}']-theirs[f'text_retrieval_recall@{k}']) < 1e-6

def test_the_set_is_what_the_study_has(sets):
    study = Study(smoke_study('data'))
    s = load_set(study.set_dir('digits'), 'test')
    m, data = load_open_clip(sets/'model'), read_wds(sets/'digits')
    r = evaluate_wds(m, data, batch=7)
    ours = zero_shot(m, s.images, s.labels, class_names(study), ['a photo of the number {c}.', '{c}'])
    assert len(data.shards) == -(-len(s)//130)
    for k in ('loss', 'top1', 'top5', 'mean_per_class_recall', 'logit_scale'):
        assert r[k] == pytest.approx(ours[k], abs=1e-6)
    captions = load_set(study.set_dir('rendered'), 'held_out').manifest.caption.tolist()
    assert [c for *_, [c] in read_wds(sets/'captions')] == [' '.join(c.split()) for c in captions]

def their_set(folder, samples, names='cat\ndog\n', templates='a photo of a {c}.\n', shards=1, **files):
    "A set as somebody else may have written it: samples are dicts of extension -> bytes."
    (folder/'test').mkdir(parents=True)
    for f, text in dict(classnames=names, zeroshot_classification_templates=templates, **files).items():
        (folder/f'{f}.txt').write_text(text)
    (folder/'test'/'nshards.txt').write_text(f'{shards}\n')
    with tarfile.open(folder/'test'/'0.tar', 'w') as tar:
        for i, (prefix, s) in enumerate(samples):
            for ext, data in s.items():
                info = tarfile.TarInfo(f'{prefix}s{i:07d}.{ext}')
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return folder

def picture(size, format, mode='RGB'):
    f = io.BytesIO()
    Image.new(mode, size, 100).save(f, format)
    return f.getvalue()

def test_their_sets_are_read(tmp_path):
    "Images of several sizes, formats and modes; names in the archive that leave its folder are no paths."
    kinds = [((20, 30), 'WEBP', 'RGB', 'webp'), ((7, 5), 'PNG', 'L', 'png'), ((64, 16), 'JPEG', 'RGB', 'jpg'),
             ((16, 16), 'PNG', 'RGBA', 'png')]
    samples = [('../../', {ext: picture(size, f, mode), 'cls': b'1'}) for size, f, mode, ext in kinds]
    before = {*tmp_path.parent.rglob('*')}
    data = read_wds(their_set(tmp_path/'a', samples))
    found = list(data)
    assert [im.size for _, im, _ in found] == [k[0] for k in kinds] and {im.mode for _, im, _ in found} == {'RGB'}
    assert evaluate_wds(random_clip(), data)['n_test'] == 4
    assert all(p == tmp_path/'a' or tmp_path/'a' in p.parents for p in {*tmp_path.parent.rglob('*')}-before)
    pairs = [('', dict(jpg=picture((9, 9), 'JPEG'), txt='a cat\na grey cat'.encode())),
             ('', dict(jpg=picture((9, 12), 'JPEG'), txt='a dog\n'.encode()))]
    r = evaluate_wds(random_clip(), read_wds(their_set(tmp_path/'b', pairs, dataset_type='retrieval')))
    assert (r['n_images'], r['n_texts']) == (2, 3)

PNG = picture((8, 8), 'PNG')

@pytest.mark.parametrize('samples, more, message', [
    ([dict(png=PNG, cls=b'2')], {}, 'label is 2: expected from 0 to 1'),
    ([dict(png=PNG, cls=b'cat')], {}, "cls is b'cat': expected text in UTF-8, a label"),
    ([dict(png=PNG)], {}, r"files is \['png'\]: expected an image .* and cls"),
    ([dict(cls=b'1')], {}, r"files is \['cls'\]: expected an image"),
    ([dict(png=PNG[:40], cls=b'1')], {}, 'not a readable image'),
    ([dict(png=PNG, txt=b'\xff')], dict(dataset_type='retrieval'), 'expected text in UTF-8'),
    ([dict(png=PNG, txt=b'')], dict(dataset_type='retrieval'), 'has no caption'),
    ([dict(png=PNG, cls=b'1')], dict(dataset_type='multilabel'), 'several labels'),
    ([dict(png=PNG, cls=b'1')], dict(names='cat\n\n'), 'class name 1'),
    ([dict(png=PNG, cls=b'1')], dict(templates='a photo\n'), 'a place for the name'),
    ([dict(png=PNG, cls=b'1')], dict(shards=2), '1.tar: no such shard'),
    ([dict(png=PNG, cls=b'1')], dict(shards='x'), "nshards.txt is 'x'"), ([], {}, 'no image in its shards')])
def test_their_sets_are_refused(tmp_path, samples, more, message):
    with pytest.raises(StudyError, match=message):
        evaluate_wds(random_clip(), read_wds(their_set(tmp_path/'a', [('', s) for s in samples], **more)))

def test_links_and_damage_in_shards_are_refused(tmp_path):
    folder = their_set(tmp_path/'a', [('', dict(png=PNG, cls=b'1'))])
    path = folder/'test'/'0.tar'
    whole = path.read_bytes()
    path.write_bytes(whole[:700])
    with pytest.raises(StudyError, match='0.tar: the shard is damaged'):
        list(read_wds(folder))
    with tarfile.open(path, 'w') as tar:
        link = tarfile.TarInfo('s0.png')
        link.type, link.linkname = tarfile.SYMTYPE, '/etc/hostname'
        tar.addfile(link)
    with pytest.raises(StudyError, match='is a link or a device'):
        list(read_wds(folder))

def test_downstream_sets_are_those_of_clip_benchmark():
    df = downstream()
    assert len(df) == 39 and not df.run_here.any() and df.name.is_unique
    datasets = pytest.importorskip('clip_benchmark.datasets.builder', reason='clip_benchmark is not installed')
    folder = Path(datasets.__file__).parent
    names, templates = (json.loads((folder/f'en_{k}.json').read_text())
                        for k in ('classnames', 'zeroshot_classification_templates'))
    known = {*datasets.dataset_collection['vtab+'], *datasets.dataset_collection['retrieval'], 'imagenet-o'}
    for r in df.itertuples():
        name = r.wds.removeprefix('wds/')
        assert name in known
        name = name.removeprefix('vtab/')
        assert len(names.get(name, range(r.n_classes))) == r.n_classes, name
        count = 80 if 'openai' in r.templates else len(templates.get(name, ()))
        assert not r.templates or r.templates.endswith(f', {count}'), name

@pytest.mark.parametrize('name, names, message', [
    ('ImageNet-R', open_clip.IMAGENET_CLASSNAMES, 'number of class names is 1000: expected 200'),
    ('imagenet', None, 'no downstream set'), ('wds/flickr8k', NAMES, 'has captions and no classes')])
def test_class_names_that_do_not_fit_a_downstream_set(name, names, message):
    with pytest.raises(StudyError, match=message):
        downstream_set(name, names)

def test_pickled_weights_and_other_models_are_refused(tmp_path):
    folder = saved_clip(tmp_path/'m', random_clip().net)
    (folder/'open_clip_config.json').write_text(json.dumps(dict(model_cfg=CONFIG | dict(embed_dim=8),
                                                                preprocess_cfg={})))
    with pytest.raises(StudyError, match='not a model that open_clip can read here'):
        load_open_clip(folder)
    (folder/'open_clip_model.safetensors').rename(folder/'open_clip_pytorch_model.bin')
    with pytest.raises(StudyError, match='weights as safetensors'):
        load_open_clip(folder)

# ---- the CLIP score of the quality stage

def test_the_clip_score_of_a_set_is_that_of_its_images_by_class(tmp_path):
    smoke = Study(smoke_study('data'))
    raw = copy.deepcopy(smoke.raw)
    raw['quality']['clip'] = {n: dict(model='clip') for n in ('rendered', 'digits')}
    for d in ('sets', 'data'):
        (tmp_path/d).symlink_to(smoke.path(d))
    (tmp_path/'models').mkdir()
    saved_clip(tmp_path/'models'/'clip', random_clip().net)
    score = score_captions(Study(tmp_path, raw), 'rendered').set_index('class')
    assert set(score.network) == {'clip'} and ((score.ci_lo <= score.value) & (score.value <= score.ci_hi))['all']
    s = load_set(smoke.set_dir('rendered'), 'train')
    i = subset(s, int(score.loc['all', 'n']), smoke.seed('order', 'rendered', 0), 10)
    each = caption_scores(load_open_clip(tmp_path/'models'/'clip'), s.images[i], s.manifest.caption.iloc[i].tolist())
    by_class = [each[s.labels[i] == c].mean() for c in range(10)]
    assert np.allclose(score.value, [*by_class, np.mean(by_class)], atol=1e-4)
    with pytest.raises(StudyError, match='quality.clip.digits: 60 of 60 images have no caption'):
        score_captions(Study(tmp_path, raw), 'digits')
    with pytest.raises(StudyError, match=r"not under quality.clip \(did you mean 'rendered'"):
        score_captions(Study(tmp_path, raw), 'renderd')
