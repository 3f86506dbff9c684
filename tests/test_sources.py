"""Images of other people: nothing is passed over in silence, pixels are what a person sees, labels are checked, and an
archive is read to its end."""
import io, os, struct, tarfile, zipfile, zlib
import numpy as np, pandas as pd, pytest
from PIL import Image, ImageOps
from pydantic import TypeAdapter
from conftest import dump
from synthscale.data import SetSpec, build_set, folder_entries, shard_samples, translate, usable
from synthscale.pixels import NearHashes, as_seen, changes, open_image
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
    assert said.startswith('pets: 20 images; ') and '2 no image by its ending' in said and '1 hidden' in said
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

# ---- what is changed, and what is alike

def gradient(seed, side=32):
    "A picture with a shape of its own."
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 255, (4, 4, 3), np.uint8)).resize((side, side), Image.Resampling.BICUBIC)

def as_bytes(im, format='PNG', **how):
    f = io.BytesIO()
    im.save(f, format, **how)
    return f.getvalue()

@pytest.fixture
def photos(tmp_path):
    "Two classes of ten pictures that are not alike, in data/pets/train, and four of each in test."
    for split, n in (('train', 10), ('test', 4)):
        for k, (c, i) in enumerate((c, i) for c in CLASSES for i in range(n)):
            put(tmp_path/'data'/'pets'/split/c/f'{i}.png', as_bytes(gradient(k if split == 'train' else 100+k)))
    return tmp_path

def exif(orientation):
    e = Image.Exif()
    e[0x0112] = orientation
    return e

def with_gamma(data, gamma):
    "A PNG file that states a gamma."
    body = b'gAMA'+struct.pack('>I', round(gamma*100000))
    return data[:33]+struct.pack('>I', 4)+body+struct.pack('>I', zlib.crc32(body))+data[33:]

CHANGED = {                                        # a file of each kind, and the word for what is done to it
    'turned': (lambda im: as_bytes(im, 'JPEG', exif=exif(6)), 'turned upright'),
    'two pictures': (lambda im: as_bytes(im.quantize(8), 'GIF', save_all=True, append_images=[im.quantize(4)]),
                     'the first of several pictures'),
    'small': (lambda im: as_bytes(im.resize((1, 1))), 'enlarged from 1 x 1 pixels'),
    '16 bits': (lambda im: as_bytes(Image.fromarray(np.asarray(im.convert('L'), np.uint16)*257)),
                'reduced to 8 bits'),
    'transparent': (lambda im: as_bytes(Image.merge('RGBA', (*im.split(), im.convert('L')))),
                    'put over the background'),
    'gamma': (lambda im: with_gamma(as_bytes(im), 1.), 'from another gamma'),
    'nothing': (lambda im: as_bytes(im, 'TIFF'), ''),
}

@pytest.mark.parametrize('kind', CHANGED)
def test_whatever_is_changed_is_listed(photos, kind):
    make, words = CHANGED[kind]
    data = make(gradient(55))
    end = open_image(data).format.lower()
    put(photos/'data'/'pets'/'train'/'cat'/f'odd.{end}', data)
    build(photos, background='white')
    notes = photos/'runs'/'data'/'pets'/'left_out.csv'
    assert notes.exists() == bool(words)
    assert not words or left_out(photos) == {f'pets/train/cat/odd.{end}': f'changed: {words}'}

def test_a_stated_gamma_is_followed():
    dark = open_image(with_gamma(as_bytes(Image.new('L', (2, 2), 55)), 1.))
    assert as_seen(dark).getpixel((0, 0)) == 127 and changes(dark, 2) == 'from another gamma'
    same = open_image(with_gamma(as_bytes(Image.new('L', (2, 2), 55)), .45455))
    assert as_seen(same).getpixel((0, 0)) == 55 and not changes(same, 2)

COPIES = {'again as JPEG': lambda im: as_bytes(im, 'JPEG', quality=90),
          'smaller': lambda im: as_bytes(im.resize((24, 24))),
          'brighter': lambda im: as_bytes(im.point(lambda v: min(v+3, 255))),
          'other palette': lambda im: as_bytes(im.quantize(128))}

@pytest.mark.parametrize('kind', COPIES)
def test_near_copies_across_splits_are_listed_by_file(photos, kind, capsys):
    put(photos/'data'/'pets'/'test'/'dog'/'copy.png', COPIES[kind](gradient(3)))       # gradient(3) is train/cat/3.png
    p = smoke_params()
    dump({'study': dict(name='s', classes=CLASSES), 'recipes': p['recipes'],
          'data': dict(root='data', image_size=32, channels=3, sets={'pets': dict(type='imagefolder', input='pets')})},
         photos/'params.yaml')
    m = build_set(Study(photos), 'pets')
    near = pd.read_csv(photos/'runs'/'data'/'pets'/'near_copies.csv')
    assert near[['file', 'near_file']].values.tolist() == [['pets/test/dog/copy.png', 'pets/train/cat/3.png']]
    assert near[['split', 'near_split', 'class', 'near_class']].values.tolist() == [['test', 'train', 'dog', 'cat']]
    assert '1 like one of another split (near_copies.csv)' in capsys.readouterr().out
    assert m.file.tolist() == read_manifest(photos/'sets'/'pets').file.tolist() and m.file.str.startswith('pets/').all()

def test_near_hashes_find_what_a_comparison_with_all_finds():
    rng = np.random.default_rng(1)
    for bits in (0, 1, 3, 10):
        codes = [int(c) for c in rng.integers(0, 2**63, 60)]
        index = NearHashes(bits)
        for i, c in enumerate(codes):
            index.add(c, i)
        for c in codes[:30]:
            for flips in range(bits+3):
                asked = c
                for b in rng.choice(63, flips, replace=False):
                    asked ^= 1 << int(b)
                d = [(asked ^ k).bit_count() for k in codes]
                want = (int(np.argmin(d)), min(d)) if min(d) <= bits else None
                assert index.nearest(asked) == want

# ---- archives: limits, links, what is behind the end, one name twice

def test_limits_are_parameters_and_name_their_key(pets):
    folder = pets/'data'/'pets'
    with zipfile.ZipFile(pets/'data'/'pets.zip', 'w', zipfile.ZIP_DEFLATED) as z:
        for f in sorted(folder.rglob('*.png')):
            z.write(f, f.relative_to(folder))
        z.writestr('cat/wide.bmp', as_bytes(Image.new('RGB', (6000, 5000)), 'BMP'))
    p = smoke_params()
    def built(**limits):
        sets = {'pets': dict(type='imagefolder', input='pets.zip')}
        dump({'study': dict(name='s', classes=CLASSES), 'recipes': p['recipes'],
              'data': dict(root='data', image_size=8, channels=3, sets=sets, limits=limits)}, pets/'params.yaml')
        return build_set(Study(pets), 'pets')
    for key, limits in (('ratio', {}), ('members', dict(members=20)), ('total_bytes', dict(total_bytes=1000)),
                        ('member_bytes', dict(ratio=2000, member_bytes=10**6)),
                        ('pixels', dict(ratio=2000, pixels=10**6))):
        with pytest.raises(StudyError, match=f'{key} is|data.limits.{key}') as e:
            built(**limits)
        assert 'pets.zip' in str(e.value), key
    assert len(built(ratio=2000)) == 21

def tar_of(path, members):
    with tarfile.open(path, 'w') as t:
        for name, data, *kind in members:
            i = tarfile.TarInfo(name)
            i.size = len(data)
            if kind:
                i.type, i.linkname, i.size = kind[0], 'x.png', 0
            t.addfile(i, io.BytesIO(data) if not kind else None)

ODD_TARS = {
    'a hard link': ([('x.png', image(1)), ('x.cls', b'0'), ('y.png', b'', tarfile.LNKTYPE)], 'y.png is a link'),
    'a symbolic link': ([('x.png', image(1)), ('x.cls', b'0'), ('y.png', b'', tarfile.SYMTYPE)], 'y.png is a link'),
    'a pipe': ([('x.png', image(1)), ('x.cls', b'0'), ('y.png', b'', tarfile.FIFOTYPE)], 'y.png is a link or a device'),
    'one name twice': ([('x.png', image(1)), ('x.cls', b'0'), ('x.png', image(2))], 'x.png is there twice'),
    'two images': ([('x.png', image(1)), ('x.jpg', image(1)), ('x.cls', b'0')],
                   "expected an image and 'cls', one of each"),
}

@pytest.mark.parametrize('odd', ODD_TARS)
def test_an_odd_tar_is_an_error_that_names_it(odd, tmp_path):
    members, words = ODD_TARS[odd]
    tar_of(tmp_path/'a.tar', members)
    with pytest.raises(StudyError, match=words) as e:
        list(shard_samples(tmp_path, CLASSES, 8, 3))
    assert 'a.tar' in str(e.value)

def test_a_second_tar_behind_the_first_is_not_lost(tmp_path):
    tar_of(tmp_path/'a.tar', [('x.png', image(1)), ('x.cls', b'0')])
    (tmp_path/'a.tar').write_bytes((tmp_path/'a.tar').read_bytes()*2)
    with pytest.raises(StudyError, match='a.tar: the shard is damaged .it ends after x, and more follows'):
        list(shard_samples(tmp_path, CLASSES, 8, 3))

def test_shards_below_others_and_other_files_are_listed(tmp_path):
    for name in ('a.tar', 'old/b.tar'):
        (tmp_path/'s'/name).parent.mkdir(parents=True, exist_ok=True)
        tar_of(tmp_path/'s'/name, [('x.png', image(1)), ('x.cls', b'0')])
    put(tmp_path/'s'/'index.json', b'{}')
    passed = []
    assert len(list(shard_samples(tmp_path/'s', CLASSES, 8, 3, passed))) == 1
    assert {r['file']: r['reason'] for r in passed} == {
        's/index.json': 'no shard by its ending', 's/old/b.tar': 'a shard in a folder below the other shards'}

def test_of_two_members_of_one_name_the_later_one_is_used_and_the_earlier_listed(tmp_path):
    with zipfile.ZipFile(tmp_path/'a.zip', 'w') as z, pytest.warns(UserWarning, match='Duplicate name'):
        for shade in (10, 20):
            z.writestr('cat/0.png', image(shade))
        z.writestr('dog/0.png', image(30))
    passed = []
    found = folder_entries(tmp_path/'a.zip', set(CLASSES), passed)
    assert open_image(found[0].read()).getpixel((0, 0)) == (20, 20, 20) and len(found) == 2
    assert passed == [dict(file='a.zip/cat/0.png', reason='a later file of the same name replaces it')]

def test_names_that_are_not_utf8_are_listed_and_stored(pets):
    folder = os.fsencode(pets/'data'/'pets'/'cat')
    for name in (b'k\xe4se.png', b'k\xe4se.txt'):
        with open(folder+b'/'+name, 'wb') as f:
            f.write(image(222))
    build(pets)
    assert left_out(pets) == {r'pets/cat/k\xe4se.txt': 'no image by its ending'}
    assert r'pets/cat/k\xe4se.png' in read_manifest(pets/'sets'/'pets').file.tolist()

# ---- paths, splits and sizes that would be found late

@pytest.mark.parametrize('path', ['../pets', 'a/../../pets', '..', '/data/../etc', 'a\\..\\b'])
@pytest.mark.parametrize('how', [dict(type='imagefolder'), dict(type='webdataset'), dict(type='hub_images', repo='x'),
                                 dict(type='files', pattern='(?P<class>.)')], ids=lambda h: h['type'])
def test_no_input_leads_out_of_the_root(path, how):
    with pytest.raises(ValueError, match='inside data.root'):
        TypeAdapter(SetSpec).validate_python(dict(how, input=path))
    if how['type'] == 'hub_images':
        with pytest.raises(ValueError, match='inside data.root'):
            TypeAdapter(SetSpec).validate_python(dict(how, input='x', repo=path))

def test_hold_out_leaves_some_of_every_class(pets):
    words = "hold_out takes all 10 images of class 'cat' from split 'train' .such as pets/cat/"
    with pytest.raises(StudyError, match=words):
        build(pets, hold_out=dict(val=20))

def test_a_leak_names_files(photos):
    put(photos/'data'/'pets'/'test'/'cat'/'same.png', (photos/'data'/'pets'/'train'/'cat'/'3.png').read_bytes())
    with pytest.raises(StudyError, match='pets/test/cat/same.png and pets/train/cat/3.png'):
        build(photos)
