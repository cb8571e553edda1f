"""Names to files: caches, resumable downloads (from a server on this machine), and what is said without a network."""

import http.server
import threading

import pytest
from fakes import save_fair_esm

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


class Server(http.server.BaseHTTPRequestHandler):
    """Serves `files`; understands Range; drops the connection after `cut` bytes of a reply when asked to."""

    files: dict[str, bytes] = {}
    cut: int | None = None
    ranges = True
    requests: list[str | None] = []

    def do_GET(self):
        body = self.files.get(self.path)
        wanted = self.headers.get("Range")
        self.requests.append(wanted)
        if body is None:
            return self.send_error(404)
        start = int(wanted.removeprefix("bytes=").removesuffix("-")) if wanted and self.ranges else 0
        if start >= len(body) and start:
            return self.send_error(416)
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(body) - start))
        self.end_headers()
        self.wfile.write(body[start : start + (self.cut or len(body))])

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    served = http.server.HTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=served.serve_forever, daemon=True).start()
    for name, value in dict(files={}, cut=None, ranges=True, requests=[]).items():
        monkeypatch.setattr(Server, name, value)
    monkeypatch.setattr(family, "FAIR_ESM_URL", f"http://127.0.0.1:{served.server_port}")
    yield Server
    served.shutdown()
    served.server_close()


def test_an_interrupted_download_continues(server, tmp_path):
    body = bytes(range(256)) * 5000
    server.files["/f"], server.cut = body, 700_000
    target = tmp_path / "sub" / "f.pt"
    with pytest.raises(OSError):
        hub.fetch(f"{family.FAIR_ESM_URL}/f", target)
    part = target.with_name("f.pt.part")
    assert not target.exists() and 0 < part.stat().st_size <= 700_000
    server.cut = None
    hub.fetch(f"{family.FAIR_ESM_URL}/f", target)
    assert target.read_bytes() == body and not part.exists()
    assert server.requests[0] is None and server.requests[1].startswith("bytes=")


def test_a_server_without_ranges_starts_again(server, tmp_path):
    server.files["/f"], server.ranges = b"right" * 100, False
    (tmp_path / "f.part").write_bytes(b"wrong")
    hub.fetch(f"{family.FAIR_ESM_URL}/f", tmp_path / "f")
    assert (tmp_path / "f").read_bytes() == b"right" * 100


def test_a_complete_part_is_taken(server, tmp_path):
    server.files["/f"] = b"all here"
    (tmp_path / "f.part").write_bytes(b"all here")
    hub.fetch(f"{family.FAIR_ESM_URL}/f", tmp_path / "f")
    assert (tmp_path / "f").read_bytes() == b"all here"


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


@pytest.mark.parametrize("name", [NAME, "facebook/esm-1b", f"facebook/{NAME}", "esm1v_t33_650M_UR90S_3"])
def test_without_a_network_the_error_says_which_file_goes_where(name, tmp_path):
    canonical = hub.canonical_name(name)
    with pytest.raises(FileNotFoundError) as caught:
        esm_fast.load(name)
    message = str(caught.value)
    assert f"{family.FAIR_ESM_URL}/models/{canonical}.pt" in message
    assert str(tmp_path / "torch" / "hub" / "checkpoints" / f"{canonical}.pt") in message
    assert ("-contact-regression.pt" in message) == canonical.startswith("esm1b")


@pytest.mark.parametrize("repository", [f"models--facebook--{NAME}", "models--facebook--esm-1b"])
def test_hugging_faces_cache_is_found(repository, tmp_path):
    snapshot = tmp_path / "hf" / "hub" / repository / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    assert hub.cached(NAME) is None
    (snapshot / "config.json").write_text("{}")
    (snapshot / "model.safetensors").write_bytes(b"")
    assert hub.resolve("facebook/esm-1b") == snapshot


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
    with pytest.raises(AttributeError, match="has no 'esm2_t33_650M_UR50D'"):
        esm_fast.pretrained.esm2_t33_650M_UR50D()
