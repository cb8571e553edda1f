"""Names to files: caches, resumable downloads (from a server on this machine), and what is said without a network."""

import builtins
import os
import stat
import sys
import warnings

import pytest
from fakes import save_fair_esm
from web import serving

import esm_fast
from esm_fast import hub
from esm_fast.models import family

NAME = "esm1b_t33_650M_UR50S"


@pytest.fixture(autouse=True)
def empty_caches(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    monkeypatch.setattr(family, "FAIR_ESM_URL", "http://127.0.0.1:9")  # nothing listens there
    return tmp_path


@pytest.fixture
def server(monkeypatch):
    with serving() as (handler, address):
        monkeypatch.setattr(family, "FAIR_ESM_URL", address)
        yield handler


def test_a_name_is_downloaded_with_its_regression_then_cached(server, fair_model, tmp_path):
    file = save_fair_esm(fair_model, tmp_path / "tiny.pt")
    server.files[f"/models/{NAME}.pt"] = file.read_bytes()
    side = tmp_path / "tiny-contact-regression.pt"
    server.files[f"/regression/{NAME}-contact-regression.pt"] = side.read_bytes()
    model, _ = esm_fast.load("facebook/esm-1b")
    assert model.num_layers == 3 and model.contact_head.regression.weight.any()
    asked = len(server.requests)
    model, alphabet = getattr(esm_fast.pretrained, NAME)()
    assert len(server.requests) == asked == 2 and len(alphabet) == 33


@pytest.mark.parametrize(
    "body", [b"", b"version https://git-lfs.github.com/spec/v1\n", b"{}", b"no checkpoint", "flipped"]
)
def test_what_is_no_checkpoint_never_enters_the_cache(server, fair_model, tmp_path, body):
    good = save_fair_esm(fair_model, tmp_path / "tiny.pt").read_bytes()
    bad = bytearray(good)
    bad[len(bad) // 2] ^= 64
    server.files["/models/esm1v_t33_650M_UR90S_1.pt"] = bytes(bad) if body == "flipped" else body
    with pytest.raises(FileNotFoundError, match="could not be downloaded"):
        esm_fast.load("esm1v_t33_650M_UR90S_1")
    assert [path.suffix for path in (tmp_path / "torch" / "hub" / "checkpoints").iterdir()] == [".lock"]
    server.files["/models/esm1v_t33_650M_UR90S_1.pt"] = good
    assert esm_fast.load("esm1v_t33_650M_UR90S_1")[0].num_layers == 3


@pytest.mark.parametrize("name", [NAME, "facebook/esm-1b", f"facebook/{NAME}", "esm1v_t33_650M_UR90S_3"])
def test_without_a_network_the_error_says_which_file_goes_where(name, tmp_path):
    canonical = hub.canonical_name(name)
    with pytest.raises(FileNotFoundError) as caught:
        esm_fast.load(name)
    message = str(caught.value)
    assert f"{family.FAIR_ESM_URL}/models/{canonical}.pt" in message
    assert str(tmp_path / "torch" / "hub" / "checkpoints" / f"{canonical}.pt") in message
    assert ("-contact-regression.pt" in message) == canonical.startswith("esm1b")


def snapshot(tmp_path, revision, repository=f"facebook/{NAME}", *, ref="main"):
    """A revision in Hugging Face's cache, as huggingface_hub lays it out: links to blobs; `ref` names it."""
    folder = tmp_path / "hf" / "hub" / f"models--{repository.replace('/', '--')}"
    place = folder / "snapshots" / revision
    place.mkdir(parents=True)
    (folder / "blobs").mkdir(exist_ok=True)
    for name in ("config.json", "model.safetensors"):
        (folder / "blobs" / f"{revision}-{name}").write_bytes(b"{}")
        (place / name).symlink_to(f"../../blobs/{revision}-{name}")
    if ref:
        (folder / "refs" / ref).parent.mkdir(parents=True, exist_ok=True)
        (folder / "refs" / ref).write_text(revision)
    return place


@pytest.fixture(params=["huggingface_hub", "without"])
def library(request, monkeypatch):
    """With the library, and as where it is not installed."""
    if request.param == "without":
        plain = builtins.__import__

        def refuse(name, *args, **kwargs):
            if name.partition(".")[0] == "huggingface_hub":
                raise ImportError(name)
            return plain(name, *args, **kwargs)

        monkeypatch.setattr(builtins, "__import__", refuse)
    else:
        pytest.importorskip("huggingface_hub")


@pytest.mark.parametrize("repository", [f"facebook/{NAME}", "facebook/esm-1b"])
def test_hugging_faces_cache_is_found(repository, tmp_path, library):
    assert hub.cached(NAME) is None
    main = snapshot(tmp_path, "abc", repository)
    assert hub.resolve("facebook/esm-1b") == main


@pytest.mark.parametrize("new, old", [("1111", "ffff"), ("ffff", "1111")])
def test_refs_main_says_which_revision_counts(tmp_path, library, new, old):
    snapshot(tmp_path, old, ref=None)
    snapshot(tmp_path, "8888", ref="refs/pr/3")
    main = snapshot(tmp_path, new)
    assert hub.resolve(NAME) == main


@pytest.mark.parametrize("harm", ["no_main", "main_is_gone", "no_weights", "dangling", "no_config", "escape"])
def test_no_other_revision_takes_the_place_of_main(tmp_path, library, harm):
    snapshot(tmp_path, "1111", ref="pr/1" if harm == "no_main" else None)
    if harm == "no_main":
        snapshot(tmp_path, "ffff", ref=None)
    else:
        main = snapshot(tmp_path, "ffff")
        if harm == "main_is_gone":
            (main.parents[1] / "refs" / "main").write_text("eeee")
        elif harm == "escape":
            (main.parents[1] / "refs" / "main").write_text("../snapshots/1111")
        elif harm == "dangling":
            (main.parents[1] / "blobs" / "ffff-model.safetensors").unlink()
        else:
            (main / ("config.json" if harm == "no_config" else "model.safetensors")).unlink()
    found = hub.cached(NAME)
    assert found is None or (harm == "escape" and found.resolve().name == "1111")


def test_a_copied_cache_without_refs_counts_where_it_is_plain(tmp_path, library):
    only = snapshot(tmp_path, "abc", ref=None)
    assert hub.cached(NAME) == only
    snapshot(tmp_path, "abd", ref=None)
    assert hub.cached(NAME) is None


def test_a_snapshot_without_all_its_shards_does_not_count(tmp_path):
    place = snapshot(tmp_path, "abc")
    (place / "model.safetensors").unlink()
    (place / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-1.safetensors"}}')
    assert hub.cached(NAME) is None
    (place / "model-1.safetensors").write_bytes(b"")
    assert hub.cached(NAME) == place


@pytest.mark.parametrize("variable", ["HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "XDG_CACHE_HOME"])
def test_the_environment_says_where_hugging_faces_cache_is(tmp_path, monkeypatch, variable):
    place = snapshot(tmp_path, "abc")
    cache = tmp_path / "hf" / "hub"
    monkeypatch.setenv("HF_HOME", str(tmp_path / "elsewhere"))
    if variable == "XDG_CACHE_HOME":
        monkeypatch.delenv("HF_HOME")
        (tmp_path / "huggingface").symlink_to(tmp_path / "hf")
        place, cache = tmp_path / "huggingface" / "hub" / place.relative_to(cache), tmp_path
    monkeypatch.setenv(variable, str(cache))
    assert hub.cached(NAME) == place


# --- a folder of the same name --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [NAME, "facebook/esm-1b", f"facebook/{NAME}"])
@pytest.mark.parametrize("kind", ["folder", "model", "file"])
def test_what_lies_in_the_working_directory_does_not_capture_a_name(tmp_path, monkeypatch, name, kind):
    cached = tmp_path / "torch" / "hub" / "checkpoints" / f"{NAME}.pt"
    cached.parent.mkdir(parents=True)
    cached.write_bytes(b"")
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).parent.mkdir(exist_ok=True)
    if kind == "file":
        (tmp_path / name).write_bytes(b"")
    else:
        (tmp_path / name).mkdir()
    if kind == "model":
        (tmp_path / name / "config.json").write_text("{}")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert hub.resolve(name) == cached
    assert [f"write ./{name}" in str(warning.message) for warning in caught] == [True] * (kind != "folder")
    assert hub.resolve(f"./{name}").absolute() == tmp_path / name
    assert hub.resolve(tmp_path / name) == tmp_path / name


# --- caches that others can write to --------------------------------------------------------------------------------


@pytest.fixture
def somebody_elses(tmp_path, monkeypatch):
    """The paths in this set seem to belong to another user. What lies above the test's folder is closed to others."""
    theirs, plain = set(), os.stat

    def stat_of(path, *, follow_symlinks=True, **kwargs):
        result = plain(path, follow_symlinks=follow_symlinks, **kwargs)
        where = os.path.realpath(path) if follow_symlinks else os.path.abspath(path)
        fields = list(result)
        if where in theirs:
            fields[stat.ST_UID] = 4242
        if tmp_path.is_relative_to(where):
            fields[stat.ST_MODE] &= ~stat.S_IWOTH
        return os.stat_result(fields)

    monkeypatch.setattr(os, "stat", stat_of)
    monkeypatch.setattr(os, "lstat", lambda path, **kwargs: stat_of(path, follow_symlinks=False, **kwargs))
    return theirs


@pytest.mark.skipif(sys.platform == "win32", reason="users and rights as POSIX has them")
@pytest.mark.parametrize("exposed", [True, False])
@pytest.mark.parametrize("cache", ["torch", "torch_side", "hf", "hf_link"])
def test_a_planted_model_is_refused_where_everybody_may_write(tmp_path, somebody_elses, exposed, cache):
    if cache.startswith("torch"):
        file = tmp_path / "torch" / "hub" / "checkpoints" / f"{NAME}.pt"
        file.parent.mkdir(parents=True)
        side = file.with_name(f"{NAME}-contact-regression.pt")
        file.write_bytes(b"")
        side.write_bytes(b"")
        found, planted, folder = file, file if cache == "torch" else side, file.parent
    else:
        found = snapshot(tmp_path, "abc")
        link = found / "model.safetensors"
        planted, folder = link if cache == "hf_link" else link.resolve(), found.parents[1]
    assert hub.cached(NAME) == found
    folder.chmod(0o1777 if exposed else 0o755)
    assert hub.cached(NAME) == found  # what is one's own may lie anywhere
    somebody_elses.add(str(planted))
    if exposed:
        with pytest.raises(hub.UntrustedError, match="everybody may write.*chmod o-w"):
            hub.resolve(NAME)
    else:
        assert hub.cached(NAME) == found  # such as the cache of a laboratory, which its owner alone writes to


# --- others ---------------------------------------------------------------------------------------------------------


def test_torch_hubs_cache_comes_first(tmp_path):
    file = tmp_path / "torch" / "hub" / "checkpoints" / f"{NAME}.pt"
    file.parent.mkdir(parents=True)
    file.write_bytes(b"")
    assert hub.resolve(NAME) == hub.resolve("facebook/esm-1b") == file


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(FileNotFoundError, match="neither a file nor a model.*esm1b_t33_650M_UR50S.*random:NAME"):
        esm_fast.load("esm9_t99")


def test_pretrained_has_fair_esms_functions():
    assert esm_fast.pretrained.esm1v_t33_650M_UR90S.__name__ == "esm1v_t33_650M_UR90S"
    assert {NAME, "esm1v_t33_650M_UR90S_5"} <= set(dir(esm_fast.pretrained))
    with pytest.raises(AttributeError, match="has no 'esm2_t33_650M_UR51D'"):
        esm_fast.pretrained.esm2_t33_650M_UR51D()
