"""Images of other people: nothing is passed over in silence, pixels are what a person sees, labels are checked, and an
archive is read to its end."""
import io, os, tarfile, zipfile
import numpy as np, pandas as pd, pytest
from PIL import Image, ImageOps
from pydantic import TypeAdapter
from conftest import dump
from synthscale.data import SetSpec, build_set, folder_entries, shard_samples, translate, usable
from synthscale.pixels import as_seen, open_image
from synthscale.shards import encode_png, read_manifest, tar_samples, write_shard
from synthscale.smoke import smoke_params
from synthscale.study import Study, StudyError

CLASSES = ['cat', 'dog']

def image(shade, side=8):
    return encode_png(np.full((side, side, 3), shade, np.uint8))

def put(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)

@pytest.fixture
def pets(tmp_path):
    "A folder of ten cats and ten dogs, each image another one, and a study of it."
    for k, (c, i) in enumerate((c, i) for c in CLASSES for i in range(10)):
        put(tmp_path/'data'/'pets'/c/f'{i}.png', image(10*k))
    return tmp_path

def build(folder, **spec):
    "The set `pets` of a study, built; the study."
    p = smoke_params()
    sets = {'pets': dict(type='imagefolder', input='pets', **spec)}
    dump({'study': dict(name='s', classes=CLASSES), 'data': dict(root='data', image_size=8, channels=3, sets=sets),
          'recipes': p['recipes']}, folder/'params.yaml')
    study = Study(folder)
    build_set(study, 'pets')
    return study

def left_out(folder):
    "left_out.csv as a dict."
    t = pd.read_csv(folder/'runs'/'data'/'pets'/'left_out.csv')
    return dict(zip(t.file, t.reason))

# ---- what is passed over

def test_everything_that_is_passed_over_is_listed_with_its_reason(pets, capsys):
    d = pets/'data'/'pets'
    for name in ('cover.jpg', 'notes.txt', 'cat/Thumbs.db', 'cat/.DS_Store', '__MACOSX/cat/._0.png', 'dog/._1.png'):
        put(d/name, image(3))
    build(pets)
    rows = left_out(pets)
    names = 'cover.jpg', 'notes.txt', 'cat/Thumbs.db', 'cat/.DS_Store', 'dog/._1.png', '__MACOSX/cat/._0.png'
    assert set(rows) == {f'pets/{n}' for n in names}
    assert 'outside the folders' in rows['pets/cover.jpg'] and 'macOS' in rows['pets/dog/._1.png']
    said = capsys.readouterr().out
    assert said.startswith('pets: 20 images; ') and '3 no image by its ending' in said
    before = (pets/'runs'/'data'/'pets'/'left_out.csv').read_bytes()
    build(pets)
    assert (pets/'runs'/'data'/'pets'/'left_out.csv').read_bytes() == before and b'0x' not in before

def broken(kind, path):
    "An image that is none, at a path."
    path.parent.mkdir(exist_ok=True)
    if kind == 'a link that leads nowhere':
        path.symlink_to(path.parent/'gone.png')
    elif kind == 'a pipe':
        os.mkfifo(path)
    else:
        path.write_bytes({'empty': b'', 'cut': image(9)[:40], 'half': image(9)[:50]}.get(kind, b'no image'))

@pytest.mark.parametrize('kind', ['empty', 'cut', 'text', 'half', 'a link that leads nowhere', 'a pipe', 'heic'])
def test_a_damaged_image_is_an_error_or_a_row(pets, kind):
    name = 'x.heic' if kind == 'heic' else 'x.png'
    broken(kind, pets/'data'/'pets'/'dog'/name)
    with pytest.raises(StudyError, match=f'dog/{name}: not a readable image'):
        build(pets)
    assert not (pets/'sets'/'pets').exists()
    build(pets, unreadable='skip')
    rows = left_out(pets)
    assert list(rows) == [f'pets/dog/{name}'] and 'not a readable image' in rows[f'pets/dog/{name}']
    assert '0x' not in rows[f'pets/dog/{name}']

def test_more_than_the_stated_share_or_a_whole_class_is_an_error(pets):
    for i in range(3):
        (pets/'data'/'pets'/'dog'/f'{i}.png').write_bytes(b'')
    with pytest.raises(StudyError, match="set 'pets': 3 of 20 images are damaged or repeats"):
        build(pets, unreadable='skip')
    build(pets, unreadable='skip', max_left_out=.2)
    for i in range(10):
        (pets/'data'/'pets'/'dog'/f'{i}.png').write_bytes(image(0))
    with pytest.raises(StudyError, match="every image of class 'dog' is damaged or a repeat"):
        build(pets, duplicates='drop', max_left_out=1.)

@pytest.mark.parametrize('name', ['x.ppm', 'x.pgm', 'x.PNG', 'x.JPEG', 'x.tga', 'x.jp2', 'x.ico', 'x.pcx', 'x.jfif',
                                  'x.dib', 'x.im', 'x.sgi', 'x.qoi', 'x.avif'])
def test_every_type_that_pillow_reads_is_read(pets, name):
    im, ext = Image.fromarray(np.full((16, 16, 3), 77, np.uint8)), name.rpartition('.')[2].lower()
    try:
        (im.convert('L') if ext == 'pgm' else im).save(pets/'data'/'pets'/'dog'/name, {'jfif': 'JPEG'}.get(ext))
    except (KeyError, OSError, ValueError):
        pytest.skip(f'Pillow does not write .{ext} here')
    study = build(pets)
    assert len(read_manifest(study.set_dir('pets'))) == 21

# ---- folders

def entries(folder):
    return [(e.split, e.label, e.name) for e in folder_entries(folder, set(CLASSES))]

def test_links_are_followed_and_loops_refused(tmp_path):
    put(tmp_path/'far'/'0.png', image(1))
    put(tmp_path/'pets'/'cat'/'0.png', image(2))
    (tmp_path/'pets'/'dog').symlink_to(tmp_path/'far')
    (tmp_path/'pets'/'cat'/'1.png').symlink_to(tmp_path/'far'/'0.png')
    assert [x[:2] for x in entries(tmp_path/'pets')] == [('train', 'cat')]*2+[('train', 'dog')]
    (tmp_path/'pets'/'cat'/'loop').symlink_to(tmp_path/'pets')
    with pytest.raises(StudyError, match='loop: a link that leads back to'):
        entries(tmp_path/'pets')

@pytest.mark.parametrize('files, want', [
    (['train/train/0.png', 'train/boat/0.png'], [('train', 'boat'), ('train', 'train')]),
    (['train/0.png', 'boat/0.png'], [('train', 'boat'), ('train', 'train')]),
    (['train/train/0.png', 'train/boat/0.png', 'boat/train/1.png'],
     [('boat', 'train'), ('train', 'boat'), ('train', 'train')]),
    (['boat/deep/er/0.png', 'boat/1.png', 'train/0.png'], [('train', 'boat')]*2+[('train', 'train')]),
    (['val/boat/0.png', 'x.png', 'val/y.png', 'val/train/z/1.png'], [('val', 'boat'), ('val', 'train')])])
def test_classes_named_like_splits_loose_files_and_folders_below(tmp_path, files, want):
    for f in files:
        put(tmp_path/'s'/f, image(1))
    passed = []
    found = folder_entries(tmp_path/'s', {'train', 'boat'}, passed)
    assert [(e.split, e.label) for e in found] == want and len(passed) == len(files)-len(want)

# ---- labels

def translated(label, study, **words):
    spec = TypeAdapter(SetSpec).validate_python(dict(type='imagefolder', input='.', fewer_classes=True, **words))
    entry = type('E', (), dict(name='x', split='train', label=label))()
    return [y for _, y, _ in translate([entry], spec, list(study), 'pets')]

@pytest.mark.parametrize('label', ['-1', '²', '٣', '2', '1.0', 'nan', 'None', 'True', ' 1', '1e0', '', '０'])
def test_what_is_no_label_is_never_one(label):
    with pytest.raises(StudyError, match='is not a class of the study'):
        translated(label, ('cat', 'dog'))
    assert translated(label, ('cat', 'dog'), classes={label: None, '0': 'cat'}) == []     # unless it is stated

def test_one_letter_written_in_two_ways_is_one_class(tmp_path):
    one, two = 'caf\u00e9', 'cafe\u0301'
    put(tmp_path/'s'/two/'0.png', image(1))
    found = folder_entries(tmp_path/'s', {one})
    assert translated(found[0].label, ('cat', 'dog'), classes={one: 'dog'}) == [1]
    assert translated(one, ('cat', 'dog'), classes={two: 'dog'}) == [1]

@pytest.mark.parametrize('label', [-1, None, 7])
def test_a_label_of_the_hub_that_stands_for_none_is_an_error(tmp_path, label):
    datasets = pytest.importorskip('datasets')
    from synthscale.data import hub_entries
    f = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=CLASSES))
    rows = dict(image=[dict(bytes=image(k), path=None) for k in range(3)], label=[0, 1, None if label is None else 0])
    d = datasets.Dataset.from_dict(rows, features=f)
    if label is not None:
        table = d.data.table.set_column(1, 'label', [[0, 1, label]])
        d = datasets.Dataset(table.cast(d.data.table.schema), info=d.info)
    d.to_parquet(tmp_path/'set'/'train.parquet')
    spec = TypeAdapter(SetSpec).validate_python(dict(type='hub_images', repo='set', input='.'))
    with pytest.raises(StudyError, match=f"set/train/2: '{label}' is not a class of the study"):
        translate(hub_entries(tmp_path, spec), spec, CLASSES, 'pets')

def test_one_image_under_two_classes_is_listed(pets, capsys):
    put(pets/'data'/'pets'/'dog'/'same.png', image(0))
    build(pets)
    t = pd.read_csv(pets/'runs'/'data'/'pets'/'two_classes.csv')
    assert sorted(t['class']) == CLASSES and t.sha256.nunique() == 1
    assert '2 in it under two classes' in capsys.readouterr().out

# ---- archives

def shard(path, n=4):
    write_shard(path, [dict(key=f'k{i}', image=image(i), label=0, caption='') for i in range(n)])
    return path.read_bytes()

@pytest.mark.parametrize('name', ['a.tar', 'a.tar.gz'])
def test_a_tar_is_read_to_its_end_or_is_an_error(tmp_path, name):
    whole = shard(tmp_path/name)
    end = 4*2*1024+512 if name == 'a.tar' else len(whole)            # 4 images and labels, and the mark of the end
    for cut in range(1, end, max(1, end//170)):
        (tmp_path/name).write_bytes(whole[:cut])
        with pytest.raises(StudyError, match=f'{name}: the shard is damaged'):
            list(shard_samples(tmp_path, CLASSES, 8, 3))
    (tmp_path/name).write_bytes(whole)
    assert len(list(shard_samples(tmp_path, CLASSES, 8, 3))) == 4

def test_a_damaged_header_and_a_huge_member_are_named(tmp_path):
    whole = bytearray(shard(tmp_path/'a.tar'))
    with tarfile.open(tmp_path/'a.tar') as t:
        third = t.getmember('k2.png')
    whole[third.offset+5] ^= 1                                     # its checksum is wrong now
    (tmp_path/'a.tar').write_bytes(whole)
    with pytest.raises(tarfile.ReadError, match='cut or damaged after k1'):
        list(tar_samples(tmp_path/'a.tar'))
    info = tarfile.TarInfo('big.png')
    info.size = 2**40
    (tmp_path/'a.tar').write_bytes(info.tobuf()+bytes(1024))
    with pytest.raises(StudyError, match='a.tar: the shard is damaged .big.png has 1099511627776 bytes'):
        list(shard_samples(tmp_path, CLASSES, 8, 3))

@pytest.mark.parametrize('files', [{'cls': b'\xff'}, {'cls': b'0', 'txt': b'caf\xe9'}])
def test_text_that_is_not_utf8_is_named(tmp_path, files):
    with tarfile.open(tmp_path/'a.tar', 'w') as t:
        for ext, data in {'png': image(1), **files}.items():
            info = tarfile.TarInfo(f'k0.{ext}')
            info.size = len(data)
            t.addfile(info, io.BytesIO(data))
    with pytest.raises(StudyError, match=r'a.tar:k0.(cls|txt): expected text in UTF-8, found byte 0x'):
        list(shard_samples(tmp_path, CLASSES, 8, 3))

def zip_of(path, damage):
    "A zip of ten images of each class whose last member is damaged."
    with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as z:
        for k in range(20):
            z.writestr(f'{CLASSES[k % 2]}/{k}.png', image(k)+bytes(2000))
        last = z.infolist()[-1]
    data = bytearray(path.read_bytes())
    if damage == 'a flipped byte':
        data[last.header_offset+30+len(last.filename)+12] ^= 255
    elif damage == 'encrypted':
        data[last.header_offset+6] |= 1
        data[data.rindex(b'PK\x01\x02')+8] |= 1
    elif damage == 'another method':
        data[data.rindex(b'PK\x01\x02')+10] = 99
    else:
        at = data.rindex(b'PK\x01\x02')+24
        data[at:at+4] = (2**31).to_bytes(4, 'little')
    path.write_bytes(data)

@pytest.mark.parametrize('damage', ['a flipped byte', 'encrypted', 'another method', 'a size of 2 GB'])
def test_a_damaged_member_of_a_zip_obeys_unreadable(tmp_path, damage):
    zip_of(tmp_path/'a.zip', damage)
    found = translate(folder_entries(tmp_path/'a.zip', set(CLASSES)), spec := TypeAdapter(SetSpec).validate_python(
        dict(type='imagefolder', input='.', unreadable='skip')), CLASSES, 'pets')
    lost = []
    assert len(usable(found, spec, 8, 3, lost)) == 19
    assert [r['file'] for r in lost] == ['a.zip/dog/19.png'] and 'not a readable image' in lost[0]['reason']

# ---- pixels

def back(im, format='PNG', **how):
    f = io.BytesIO()
    im.save(f, format, **how)
    return open_image(f.getvalue(), 'x.png')

@pytest.mark.parametrize('orientation', range(1, 9))
@pytest.mark.parametrize('format', ['JPEG', 'PNG', 'WEBP', 'TIFF'])
def test_all_orientations_of_all_formats_are_upright(format, orientation):
    want = Image.fromarray(np.arange(96, dtype=np.uint8).reshape(8, 12)*2).convert('RGB')
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = back(want, format, exif=exif, **(dict(quality=100, subsampling=0) if format == 'JPEG' else {}),
                  **(dict(lossless=True) if format == 'WEBP' else {}))
    upright = ImageOps.exif_transpose(stored)
    assert (np.asarray(as_seen(stored)) == np.asarray(upright)).all()
    assert as_seen(stored).size == ((8, 12) if orientation > 4 else (12, 8))

@pytest.mark.parametrize('mode', ['1', 'L', 'LA', 'P', 'PA', 'RGB', 'RGBA', 'CMYK', 'YCbCr', 'HSV', 'I;16', 'I', 'F',
                                  'La', 'RGBa'])
def test_every_mode_is_seen_or_names_the_choice(mode):
    "An opaque picture of two halves; what comes out is grey or RGB and has the halves."
    a = np.zeros((4, 8), np.uint8)
    a[:, 4:] = 255
    im = Image.fromarray(a)
    if mode in ('I;16', 'I', 'F'):
        kind = {'I;16': np.uint16, 'I': np.int32, 'F': np.float32}[mode]
        im = Image.fromarray((a.astype(np.float64)*257).astype(kind))
    elif mode in ('La', 'RGBa'):
        im = im.convert({'La': 'LA', 'RGBa': 'RGBA'}[mode]).convert(mode)
    elif mode != 'L':
        im = (im.convert('RGB') if mode in ('CMYK', 'YCbCr', 'HSV') else im).convert(mode)
    if mode in ('I', 'F'):
        with pytest.raises(StudyError, match=r'value_range: \[black, white\]'):
            as_seen(im)
    seen = as_seen(im, value_range=[0, 65535] if mode in ('I', 'F') else None)
    assert seen.mode in ('L', 'RGB') and (np.abs(np.asarray(seen.convert('L'), int)-a) <= 2).all()

def test_no_number_and_a_broken_profile():
    with pytest.raises(StudyError, match='pixels that are no numbers'):
        as_seen(Image.fromarray(np.full((2, 2), np.nan, np.float32)), value_range=[0, 1])
    im = Image.fromarray(np.full((2, 2, 3), 9, np.uint8))
    assert (np.asarray(as_seen(back(im, icc_profile=b'no profile'))) == 9).all()
