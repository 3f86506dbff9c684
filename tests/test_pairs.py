"Image-caption sets and caption pools: what is read, what is refused, and that captions stay with their images."
import io, json, os, tarfile, zipfile
from pathlib import Path
import numpy as np, pandas as pd, pytest
from conftest import ROOT
from synthscale.data import build_set
from synthscale.params import problems
from synthscale.pools import cut_captions, pool_images, pool_order, read_pool, source_positions, write_pool
from synthscale.shards import encode_png, load_set, read_manifest, write_set
from synthscale.smoke import smoke_params
from synthscale.study import Study, StudyError, write_atomic, write_csv

SHARED = Path(os.environ.get('SYNTHSCALE_SHARED', ROOT.parent/'shared'/'data'))

def picture(k, side=12):
    "The bytes of an image that is like no other one."
    return encode_png(np.random.default_rng(k).integers(0, 255, (side, side, 3), np.uint8))

def study_of(folder, names=('any',), **spec):
    "A study with one set of pairs, `mine`, whose input is a folder of that name."
    p = smoke_params()
    p['study'] |= dict(classes=list(names))
    p['data'] |= dict(root='.', image_size=12, channels=3, shard_size=4,
                      sets=dict(mine=dict(type='pairs', form='table', input='mine') | spec))
    p['clip'] = dict(pools=dict(pool=dict(set='mine')))
    return Study(folder, p)

def left_out(study):
    "reason -> the files and rows of left_out.csv."
    t = pd.read_csv(study.path('runs', 'data', 'mine', 'left_out.csv'))
    return t.groupby(t.reason.str.partition(' (')[0]).file.agg(list).to_dict()

@pytest.fixture
def table(tmp_path):
    "Six images, a.png to f.png, in a folder; returns a function that writes captions.csv and gives a study."
    for k, f in enumerate('abcdef'):
        write_atomic(tmp_path/'mine'/'images'/f'{f}.png', picture(k))
    def make(text, file='captions.csv', **spec):
        write_atomic(tmp_path/'mine'/file, text)
        return study_of(tmp_path, table=file, images='images', **spec)
    return make

GOOD = 'file,caption\n'+''.join(f'{f}.png,image {f}\n{f}.png,again  {f}\n' for f in 'abcdef')

# ---- tables

def test_rows_of_an_image_are_lines_of_its_caption(table):
    study = table(GOOD)
    m = build_set(study, 'mine')
    assert m.caption.tolist() == [f'image {f}\nagain {f}' for f in 'abcdef']
    assert (m.label == 0).all() and (m.split == 'train').all()
    assert m.file.tolist() == [f'mine/images/{f}.png' for f in 'abcdef']
    assert not study.path('runs', 'data', 'mine', 'left_out.csv').exists()
    stored = load_set(study.set_dir('mine'))                       # captions are in the shards, too
    assert (stored.images[2] == np.random.default_rng(2).integers(0, 255, (12, 12, 3), np.uint8)).all()

def test_a_zip_and_a_parquet_table_give_the_same_set(table, tmp_path):
    csv = build_set(table(GOOD), 'mine')
    rows = pd.read_csv(io.StringIO(GOOD)).groupby('file', sort=False).caption.agg(list).reset_index()
    rows.to_parquet(tmp_path/'lists.parquet')
    (tmp_path/'mine'/'captions.csv').unlink()
    with zipfile.ZipFile(tmp_path/'mine.zip', 'w') as z:
        z.write(tmp_path/'lists.parquet', 'text/lists.parquet')
        for f in 'abcdef':
            z.write(tmp_path/'mine'/'images'/f'{f}.png', f'images/{f}.png')
    other = build_set(study_of(tmp_path, input='mine.zip', table='text/lists.parquet', images='images'), 'mine')
    same = ['key', 'split', 'label', 'caption', 'sha256']
    assert other[same].equals(csv[same])

def test_images_in_a_zip_beside_the_table(tmp_path):
    write_atomic(tmp_path/'mine'/'captions.tsv', 'file\tcaption\nsub/a.png\tan "A" in quotes\n')
    with zipfile.ZipFile(tmp_path/'mine'/'images.zip', 'w') as z:
        z.writestr('sub/a.png', picture(0))
    m = build_set(study_of(tmp_path, table='captions.tsv', images='images.zip'), 'mine')
    assert m[['caption', 'file']].values.tolist() == [['an "A" in quotes', 'mine/images.zip/sub/a.png']]

def test_splits_by_column_and_classes_by_label(table):
    rows = ''.join(f'{f}.png,{f},{"test" if f in "ef" else "train"},{"dog" if f in "bdf" else "cat"}\n'
                   for f in 'abcdef')
    study = table('file,caption,part,kind\n'+rows, split='part', label='kind', classes={'cat': 'katze', 'dog': 'hund'})
    study = Study(study.dir, study.raw | dict(study=study.raw['study'] | dict(classes=['hund', 'katze'])))
    m = build_set(study, 'mine')
    assert m.groupby('split')['class'].agg(list).to_dict() == dict(test=['hund', 'katze'],
                                                                   train=['hund', 'hund', 'katze', 'katze'])

BAD = (b'file,caption\na.png,good\na.png,  \nb.png,\t\nc.png,caf\xe9\nd.png,fine\nnone.png,a ghost\ne.png,x,y\n'
       b',who\nf.png,ok\n')

def test_bad_rows_are_named_and_counted(table):
    with pytest.raises(StudyError) as e:
        build_set(table(BAD), 'mine')
    said = str(e.value)
    for words in ('2 with a blank caption, the first: captions.csv, row 3 (a.png)',
                  '1 with a caption that is not UTF-8, the first: captions.csv, row 5 (c.png)',
                  '1 with another number of columns than 2, the first: captions.csv, row 8',
                  '1 with no file name, the first: captions.csv, row 9',
                  '1 with no such image, the first: captions.csv, row 7 (none.png)', 'unreadable: skip'):
        assert words in said, said
    assert not table(BAD).path('sets', 'mine').exists()

def test_bad_rows_may_be_left_out_and_are_listed(table):
    study = table(BAD, unreadable='skip', max_left_out=.6)
    assert build_set(study, 'mine').caption.tolist() == ['good', 'fine', 'ok']
    assert {k: len(v) for k, v in left_out(study).items()} == {
        'a blank caption': 2, 'a caption that is not UTF-8': 1, 'another number of columns than 2': 1,
        'no file name': 1, 'no such image': 1, 'no caption': 2, 'an image that the table does not name': 1}
    with pytest.raises(StudyError, match='3 of 6 images cannot be used, which is more than max_left_out'):
        build_set(table(BAD, unreadable='skip'), 'mine')

def test_columns_tables_and_lists_that_are_not_there(table):
    for spec, error in ((dict(caption='captions'), "captions.csv: no column 'captions' .did you mean 'caption'"),
                        (dict(caption=['caption', 'second']), "no column 'second'"),
                        (dict(lists=dict(train='train.txt')), "no file 'train.txt' .lists.train."),
                        (dict(split='part'), "no column 'part'")):
        with pytest.raises(StudyError, match=error):
            build_set(table(GOOD, **spec), 'mine')
    with pytest.raises(StudyError, match="no file 'other.csv' .table."):
        build_set(study_of(table(GOOD).dir, table='other.csv'), 'mine')
    with pytest.raises(StudyError, match='has no pair'):
        build_set(table('file,caption\n'), 'mine')

def test_an_image_in_two_splits_is_an_error(table, tmp_path):
    write_atomic(tmp_path/'mine'/'train.txt', 'a.png\nb.png\n')
    write_atomic(tmp_path/'mine'/'test.txt', 'c.png\nb.png\na.png')
    study = table(GOOD, lists=dict(train='train.txt', test='test.txt'), unreadable='skip')
    with pytest.raises(StudyError, match="2 images are in two splits, the first is b.png: 'train' in train.txt, row 2, "
                                         "'test' in test.txt, row 2"):
        build_set(study, 'mine')
    with pytest.raises(StudyError, match="1 images are in two splits, the first is a.png: 'x' in captions.csv, row 2, "
                                         "'y' in captions.csv, row 3"):
        build_set(table('file,caption,part\na.png,one,x\na.png,two,y\n', split='part'), 'mine')

def test_the_same_pixels_in_two_splits_are_an_error(table, tmp_path):
    write_atomic(tmp_path/'mine'/'images'/'b.png', picture(0))
    with pytest.raises(StudyError, match='the same image is in two splits'):
        build_set(table('file,caption,part\na.png,one,x\nb.png,two,y\n', split='part'), 'mine')

def test_lists_choose_images_and_the_rest_is_listed(table, tmp_path):
    write_atomic(tmp_path/'mine'/'train.txt', 'a.png\nghost.png\na.png\n')
    study = table(GOOD, lists=dict(train='train.txt'), unreadable='skip', max_left_out=.5)
    assert build_set(study, 'mine').caption.tolist() == ['image a\nagain a']
    found = left_out(study)
    assert found['no such image'] == ['train.txt, row 2 (ghost.png)']
    assert found['listed again'] == ['train.txt, row 3']
    assert len(found['in no list of splits']) == 5 and 'an image that the table does not name' not in found

def test_damaged_images_are_counted(table, tmp_path):
    for f in 'bd':
        write_atomic(tmp_path/'mine'/'images'/f'{f}.png', picture(9)[:60])
    with pytest.raises(StudyError, match='images/b.png: not a readable image.*; 2 of 6 images cannot be used'):
        build_set(table(GOOD), 'mine')
    study = table(GOOD, unreadable='skip', max_left_out=.5)
    assert len(build_set(study, 'mine')) == 4

def test_keys_that_do_not_go_together(table):
    for spec, words in ((dict(form='img2dataset'), 'mine.table is'), (dict(classes={'a': 'any'}), 'mine.classes is'),
                        (dict(split='a', lists=dict(b='c')), 'mine.split is'), (dict(cut='('), 'mine.cut is')):
        study = table(GOOD, **spec)
        assert any(words in p for p in problems(study)), problems(study)
        with pytest.raises(StudyError, match=words):
            build_set(study, 'mine')

# ---- img2dataset

def write_tar(path, samples):
    "A shard of (name, bytes)."
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, 'w') as tar:
        for name, data in samples:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path

def web(k, text=b'a caption', **said):
    "The files of one sample."
    said = dict(status='success', url=f'https://example.org/{k}.jpg', caption='of json') | said
    return [(f'{k:09d}.png', picture(k)), (f'{k:09d}.txt', text), (f'{k:09d}.json', json.dumps(said).encode())]

def test_shards_of_img2dataset(tmp_path):
    write_tar(tmp_path/'mine'/'train'/'00000.tar', web(0, b'one\ntwo')+web(1)[::2]+web(2, status='failed_to_download'))
    write_tar(tmp_path/'mine'/'val'/'00000.tar', web(3, b' three\r\n'))
    failed = dict(key=['000000000', '000000002', '000000009'], status=['success', *2*['failed_to_download']])
    pd.DataFrame(failed | dict(error_message=[None, 'x', '404'])).to_parquet(tmp_path/'mine'/'train'/'00000.parquet')
    write_atomic(tmp_path/'mine'/'train'/'00000_stats.json', '{}')
    study = study_of(tmp_path, form='img2dataset')
    m = build_set(study, 'mine')
    assert m[['split', 'caption']].values.tolist() == [['train', 'one\ntwo'], ['train', 'of json'], ['val', 'three']]
    assert m.file[0] == 'train/00000.tar:000000000'
    assert left_out(study) == {'status failed_to_download': ['train/00000.tar:000000002', 'train/00000.tar:000000009']}
    joined = build_set(study_of(tmp_path, form='img2dataset', lines='joined'), 'mine')
    assert joined.caption[0] == 'one two'

def test_bad_samples_of_shards(tmp_path):
    samples = web(0)+web(1, b'\xff')+web(2, b'')+web(3)[1:]+[*web(4)[:2], (f'{4:09d}.json', b'{')]
    shard = write_tar(tmp_path/'mine'/'00000.tar', samples)
    with pytest.raises(StudyError, match='4 rows cannot be used') as e:
        build_set(study_of(tmp_path, form='img2dataset'), 'mine')
    for k, kind in ((1, 'a caption that is not UTF-8'), (2, 'a blank caption'), (3, 'no such image'),
                    (4, 'a .json that is not readable')):
        assert f'1 with {kind}, the first: 00000.tar:{k:09d}' in str(e.value)
    study = study_of(tmp_path, form='img2dataset', unreadable='skip', max_left_out=.8)
    assert build_set(study, 'mine').caption.tolist() == ['a caption']
    shard.write_bytes(shard.read_bytes()[:-9000])
    with pytest.raises(StudyError, match='00000.tar: the shard is damaged'):
        build_set(study, 'mine')

# ---- the hub

def test_a_folder_like_a_set_of_the_hub(tmp_path):
    datasets = pytest.importorskip('datasets')
    kinds = datasets.Features(image=datasets.Image(), caption_0=datasets.Value('string'), more=datasets.Sequence(
        datasets.Value('string')), kind=datasets.ClassLabel(names=['cat', 'dog']))
    for split, n in (('train', 4), ('test', 2)):
        rows = dict(image=[dict(bytes=picture(10*n+k), path=None) for k in range(n)],
                    caption_0=['  first', None, 'second', 'third'][:n], more=[[f'x {k}', 'y'] for k in range(n)],
                    kind=[0, 1, 0, 1][:n])
        (tmp_path/'mine').mkdir(exist_ok=True)
        datasets.Dataset.from_dict(rows, features=kinds).to_parquet(tmp_path/'mine'/f'{split}.parquet')
    hub = dict(form='hub', repo='mine', caption=['caption_0', 'more'], label='kind')
    with pytest.raises(StudyError, match='2 rows cannot be used: 2 with a blank caption, the first: mine/train/1'):
        build_set(study_of(tmp_path, ('cat', 'dog'), **hub), 'mine')
    m = build_set(study_of(tmp_path, ('cat', 'dog'), unreadable='skip', **hub), 'mine')
    assert m[m.split == 'train'].caption.tolist() == ['first\nx 0\ny', 'second\nx 2\ny', 'x 1\ny', 'third\nx 3\ny']
    assert m[m.split == 'train']['class'].tolist() == ['cat', 'cat', 'dog', 'dog']
    with pytest.raises(StudyError, match="mine: no column 'captions' .did you mean"):
        build_set(study_of(tmp_path, form='hub', repo='mine', caption='captions'), 'mine')

# ---- pools

def pooled(folder, classes, counts, n=None):
    "A study whose set `mine` has so many images of each class, and its pool."
    labels = [c for c, k in enumerate(counts) for _ in range(k)]
    study = study_of(folder, classes, table='captions.csv')
    samples = [dict(split='train', label=y, image=np.full((8, 8, 3), k, np.uint8), caption=f'image {k}\nmore {k}')
               for k, y in enumerate(labels)]
    write_set(study.path('sets', 'mine'), samples, list(classes))
    study.raw['clip']['pools']['pool'] |= {} if n is None else dict(n=n)
    study = Study(folder, study.raw)
    write_pool(study, 'pool')
    return study

@pytest.mark.parametrize('counts, n', [((12,), None), ((12,), 5), ((4, 4, 4), 7), ((5, 2, 4), None)])
def test_a_pool_and_its_images_in_any_shares(tmp_path, counts, n):
    study = pooled(tmp_path, ['a', 'b', 'c'][:len(counts)], counts, n)
    t, m = read_pool(study, 'pool'), read_manifest(study.set_dir('mine'))
    assert len(t) == (n or sum(counts)) and t.key.is_unique
    rows = m.iloc[pool_images(study, 'pool', 'mine')]
    assert rows.key.tolist() == t.key.tolist() and rows.label.tolist() == t.label.tolist()
    assert [c.split('\n')[0] for c in rows.caption] == t.prompt.tolist()
    at = source_positions(t, len(counts))
    assert len(set(at)) == len(t) and (at % len(counts) == t.label).all()
    order = pool_order(study, 'pool', 0)
    assert sorted(order) == list(range(len(t)))
    assert n is None or np.ptp(np.bincount(t.label, minlength=len(counts))) <= 1

def test_a_larger_pool_begins_with_the_smaller_one(tmp_path):
    small = read_pool(pooled(tmp_path, ['a', 'b'], (8, 8), 6), 'pool')
    large = read_pool(pooled(tmp_path, ['a', 'b'], (8, 8)), 'pool')
    assert large[:6].equals(small)

def as_source(study, prompts, attempts=1):
    "A set that looks as if it was generated from the pool, with these prompts; and the study that has it."
    study.raw['generate']['sources'] = dict(made=dict(model='mini_sd', prompts='pool', guidance_scale=1.5,
                                                      n_images=len(prompts)))
    classes = study.study.classes
    samples = [dict(split='train', label=i % len(classes), image=np.full((8, 8, 3), 100+i, np.uint8), caption=p,
                    prompt=p, attempts=attempts) for i, p in enumerate(prompts)]
    write_set(study.path('sets', 'made'), samples, classes)
    return Study(study.dir, study.raw)

def test_a_source_of_other_captions_is_refused(tmp_path):
    study = pooled(tmp_path, ['a', 'b'], (4, 4))
    t = read_pool(study, 'pool')
    right = [''] * len(t)
    for i, p in zip(source_positions(t, 2), t.prompt):
        right[i] = p
    made = as_source(study, right)
    m = read_manifest(made.set_dir('made'))
    assert m.caption.iloc[pool_images(made, 'pool', 'made')].tolist() == t.prompt.tolist()
    swapped = [right[2], right[1], right[0], *right[3:]]
    for prompts, attempts, error in ((swapped, 1, r'2 such images.: the set is of an older pool'),
                                     (swapped, 9, 'at attempt 9 it was drawn with another prompt'),
                                     (right[:6], 1, 'number of images is 6: expected 8, one for each caption'),
                                     (right+right[:2], 1, 'number of images is 10: expected 8')):
        with pytest.raises(StudyError, match=error):
            pool_images(as_source(study, prompts, attempts), 'pool', 'made')
    t.loc[3, 'key'] = 'train-0000099'
    write_csv(study.path('runs', 'prompts', 'pool.csv'), t.assign(origin='mine/'+t.key))
    with pytest.raises(StudyError, match='1 images are not in set .mine., e.g. train-0000099'):
        pool_images(study, 'pool', 'mine')

def test_captions_survive_a_table_of_text(tmp_path):
    "Whatever a caption holds, the pool that is read is the one that was written."
    odd = ['NA', '007', '"quoted", with comma', "'", 'null', 'a\u200db', '犬 🐕', '#x']
    study = study_of(tmp_path, table='x.csv')
    samples = [dict(split='train', label=0, image=np.full((8, 8, 3), k, np.uint8), caption=c)
               for k, c in enumerate(odd)]
    write_set(study.path('sets', 'mine'), samples, ['any'])
    write_pool(study, 'pool')
    assert sorted(read_pool(study, 'pool').prompt) == sorted(odd)
    assert len(pool_images(study, 'pool', 'mine')) == len(odd)

def test_pools_in_params():
    p = smoke_params()
    p['clip'] = dict(pools=dict(names=dict(set='rendered'), tested=dict(set='digits', split='ood'),
                                few=dict(set='rendered', n=5), of=dict(set='names_g2'),
                                gone=dict(set='rendered', split='x')))
    p['generate']['sources']['names_g2']['prompts'] = 'few'
    said = '\n'.join(problems(Study(ROOT, p)))
    for words in ("'names' is under prompts.sets and under clip.pools", "clip.pools.tested.split is 'ood': expected a "
                  "training split", 'clip.pools.few.n is 5: expected at least one caption for each of 10 classes',
                  "clip.pools.of.set is 'names_g2': no such set", "clip.pools.gone.split: set 'rendered' has no split"):
        assert words in said, said

def test_cut_captions_of_a_transformers_tokenizer(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast
    t = Tokenizer(models.WordLevel({'[S]': 0, '[E]': 1, 'a': 2, '[U]': 3}, unk_token='[U]'))
    t.pre_tokenizer = pre_tokenizers.Whitespace()
    t.post_processor = processors.TemplateProcessing(single='[S] $A [E]', special_tokens=[('[S]', 0), ('[E]', 1)])
    fast = PreTrainedTokenizerFast(tokenizer_object=t, model_max_length=5)
    assert cut_captions(fast, ['a a a', 'a a a a', 'a']).tolist() == [False, True, False]
    with pytest.raises(StudyError, match='not known how to count'):
        cut_captions(type('T', (), dict(context_length=5))(), ['a'])

# ---- Flickr8k

@pytest.mark.slow
@pytest.mark.skipif(not (SHARED/'flickr8k_64.zip').exists(),
                    reason='the data of studies/flickr8k is not on this machine')
def test_flickr8k_is_read_whole(tmp_path):
    p = Study(ROOT/'studies'/'flickr8k').raw
    p['data'] |= dict(root=str(SHARED), image_size=8, near_bits=0)
    study = Study(tmp_path, p)
    m = build_set(study, 'flickr8k')
    assert m.groupby('split').size().to_dict() == dict(train=6000, dev=1000, test=1000)
    assert (m.caption.str.count('\n') == 4).all()
    t = pd.read_csv(study.path('runs', 'data', 'flickr8k', 'left_out.csv'))
    assert (t.reason == 'no such image').sum() == 100
    assert (t.reason == 'in no list of splits').sum() == 95
    assert write_pool(study, 'captions').images.tolist() == [6000]
