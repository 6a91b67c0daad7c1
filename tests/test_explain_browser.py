"""The pages in a browser: what they show of a pixel is what the model says, however the pixel was chosen."""

import shutil
import time
from itertools import pairwise

import pytest
import torch

import explain
from dataset import build_dataset
from evaluation.labelling import View, label_image
from explanation.pixel_data import pack as pixel_pack
from inference import open_model
from tests.explained import Patches, make_checkpoint
from tests.tiny import tiny_config

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="no chromium with chromedriver here: apt-get install chromium chromium-driver"
)
OPTIONS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    " --disable-component-update --disable-sync --hide-scrollbars --window-size=1280,1000"
)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    for option in [*OPTIONS.split(), f"--user-data-dir={tmp_path_factory.mktemp('profile')}"]:
        options.add_argument(option)
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    complaints = driver.get_log("browser")  # a script error, or something that the content security policy refused
    driver.quit()
    assert complaints == []


@pytest.fixture
def shown(workdir, browser):
    """A function that opens the page of the first val image, and the model's numbers for it."""

    def start(*overrides, place="", change=lambda state: None):
        make_checkpoint("model.pth", *overrides, change=change)
        explain.main(["--checkpoint", "model.pth", "--out", "out", "--count", "1"])
        browser.get("about:blank")
        browser.get((workdir / "out" / "001-scene-val-00000.html").as_uri() + place)
        wait_for(lambda: panel(browser))
        return Truth(open_model("model.pth").inference, build_dataset(tiny_config(*overrides), "val")[0][0])

    return start


class Truth:
    """Of every pixel: scores (C, H, W), class (H, W) and contributions (C, P, H, W), as the evaluation sees them."""

    @torch.no_grad()
    def __init__(self, inference, image):
        self.height, self.width = size = image.shape[1:]
        self.scores = inference.logits(image[None])[0]
        self.classes = label_image(inference, image[None], View())[0][0]
        distances = inference.output(image[None]).distances
        if distances is not None:
            contributions = inference.model.contributions(distances)[0]
            self.contributions = inference.upsample(contributions, size)


def wait_for(condition):
    """What a condition returns once it is true."""
    limit = time.monotonic() + 20
    while not (found := condition()):
        assert time.monotonic() < limit, "the page did not get there"
        time.sleep(0.05)
    return found


def panel(browser):
    """What the page says of its pixel: place, predicted class, scores, [(prototype, contribution)], the rest, sum."""
    return browser.execute_script("""
        const why = document.querySelector(".why"), number = (item) =>
            +item.querySelector(".number").textContent.replace("−", "-");
        if (why.hasAttribute("aria-busy")) return null;
        const all = (selector) => [...why.querySelectorAll(selector)];
        return {x: +why.dataset.x, y: +why.dataset.y, predicted: +why.dataset.predicted,
            scores: all("[data-class]").map((item) => [+item.dataset.class, number(item)]),
            chosen: +why.querySelector("[aria-pressed=true]").dataset.class,
            parts: all("[data-prototype]").map((item) => [+item.dataset.prototype, number(item)]),
            rest: all(".rest").map(number)[0] ?? 0, sum: all(".sum").map(number)[0] ?? null};""")


def check(found, truth):
    """What a panel shows is what the model computes: every score, every contribution, their sum, the strongest."""
    x, y, c = found["x"], found["y"], found["chosen"]
    scores = truth.scores[:, y, x]
    assert scores[found["predicted"]] >= scores.max() - 1e-4
    for class_index, score in found["scores"]:
        assert abs(score - scores[class_index]) < 1e-3
    contributions = truth.contributions[c, :, y, x]
    for p, value in found["parts"]:
        assert abs(value - contributions[p]) < 1e-3
    assert abs(sum(value for _, value in found["parts"]) + found["rest"] - scores[c]) < 1e-3
    assert abs(found["sum"] - scores[c]) < 1e-3
    strongest = found["parts"][0][0]
    assert strongest == contributions.argmax() or contributions[strongest] > contributions.max() - 1e-3
    assert all(a[1] >= b[1] for a, b in pairwise(found["parts"]))


def canvas(browser):
    return browser.find_element("id", "overlay")


def hover(browser, truth, x, y, click=False):
    """Move the mouse to a pixel of the picture."""
    area = canvas(browser)
    scale = area.rect["width"] / truth.width
    across, down = round((x + 0.5 - truth.width / 2) * scale), round((y + 0.5 - truth.height / 2) * scale)
    actions = webdriver.ActionChains(browser).move_to_element_with_offset(area, across, down)
    (actions.click() if click else actions).perform()


def press(browser, *keys):
    canvas(browser).send_keys(*keys)


@pytest.mark.parametrize("overrides", [(), ("dataset.shapes.image_size=65",)])
def test_pixels_under_the_mouse_show_the_models_numbers(shown, browser, overrides):
    truth = shown(*overrides)
    for x, y in [(0, 0), (7, 9), (8, 16), (33, 20), (truth.width - 1, truth.height - 1)]:
        hover(browser, truth, x, y)
        found = panel(browser)
        assert (found["x"], found["y"]) == (x, y)
        check(found, truth)


def go(browser, x, y):
    """Follow a link to a pixel; returns what the page says of it."""
    browser.execute_script("location.hash = arguments[0]", f"#x={x},y={y}")
    return wait_for(lambda: (panel(browser)["x"], panel(browser)["y"]) == (x, y) and panel(browser))


@pytest.mark.parametrize("side", [37, 44, 64])
@pytest.mark.parametrize("tile", [3, 16])
def test_a_page_of_patch_features_looks_where_their_cells_look(shown, browser, monkeypatch, side, tile):
    monkeypatch.setattr("model.DeepLabFeatures", Patches)
    monkeypatch.setattr("explanation.pixel_data.TILE", tile)
    monkeypatch.setattr("explanation.image_page.pack", lambda *how: pixel_pack(*how, limit=10**6 if tile == 16 else 0))
    truth = shown(f"dataset.shapes.image_size={side}")
    for x, y in [(0, 0), (3, 4), (7, 8), (11, 12), (20, 33), (side - 1, 5), (24, side - 1), (side - 1, side - 1)]:
        check(go(browser, x, y), truth)


@pytest.mark.parametrize("precision", ["bfloat16", "float32"])
def test_the_painted_classes_are_those_of_the_evaluation(shown, browser, monkeypatch, precision):
    monkeypatch.setattr("model.DeepLabFeatures", Patches)
    truth = shown(f"system.precision={precision}", "dataset.shapes.image_size=133")
    assert len(truth.classes.unique()) > 2
    bytes_of = browser.execute_script("""
        const canvas = document.getElementById("overlay");
        return [...canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data];""")
    painted = torch.tensor(bytes_of).view(truth.height, truth.width, 4)[..., None, :3]
    palette = torch.tensor(build_dataset(tiny_config(), "val").mapping.palette)
    assert torch.equal((painted - palette).abs().sum(-1).argmin(-1), truth.classes)
    check(go(browser, 60, 71), truth)


def test_a_click_keeps_a_pixel_and_keys_move_on(shown, browser):
    truth = shown()
    keys = webdriver.Keys
    hover(browser, truth, 12, 30, click=True)
    assert browser.current_url.endswith("#x=12,y=30")
    hover(browser, truth, 3, 3)
    assert (panel(browser)["x"], panel(browser)["y"]) == (3, 3)
    webdriver.ActionChains(browser).move_to_element(browser.find_element("tag name", "h1")).perform()
    assert (panel(browser)["x"], panel(browser)["y"]) == (12, 30)  # the kept one is back
    press(browser, keys.ARROW_RIGHT, keys.ARROW_RIGHT, keys.ARROW_UP)
    found = panel(browser)
    assert (found["x"], found["y"]) == (14, 29) and browser.current_url.endswith("#x=14,y=29")
    check(found, truth)
    press(browser, keys.SHIFT + keys.ARROW_LEFT + keys.ARROW_LEFT + keys.ARROW_DOWN)
    assert (panel(browser)["x"], panel(browser)["y"]) == (0, 37)
    check(panel(browser), truth)


def test_the_keyboard_alone_reaches_the_picture(shown, browser):
    shown()
    for _ in range(10):
        webdriver.ActionChains(browser).send_keys(webdriver.Keys.TAB).perform()
        if browser.switch_to.active_element.get_attribute("id") == "overlay":
            return
    pytest.fail("the picture cannot be reached with the Tab key")


def test_a_link_leads_to_its_pixel(shown, browser):
    truth = shown(place="#x=31,y=5")
    assert (panel(browser)["x"], panel(browser)["y"]) == (31, 5)
    check(panel(browser), truth)
    browser.execute_script("location.hash = '#x=2,y=40'")
    wait_for(lambda: panel(browser)["y"] == 40)
    check(panel(browser), truth)
    for nonsense in ("#x=9999,y=9999", "#x=<b>,y=1"):  # a pixel beyond the picture is its last; the rest is no link
        browser.execute_script("location.hash = arguments[0]", nonsense)
        assert panel(browser)["x"] < truth.width


def test_another_class_can_be_taken_apart_and_all_of_it_shown(shown, browser):
    truth = shown(place="#x=20,y=20")
    browser.execute_script("document.querySelectorAll('.score button')[2].click()")
    found = panel(browser)
    assert found["chosen"] == found["scores"][2][0] != found["predicted"]
    check(found, truth)
    browser.execute_script("document.querySelector('button.plain').click()")
    assert len(panel(browser)["scores"]) == 6
    browser.execute_script("[...document.querySelectorAll('button.plain')].at(-1).click()")
    found = panel(browser)
    assert len(found["parts"]) >= 11  # all but those that add less than 0.0005
    check(found, truth)


def test_a_pruned_model_with_linear_activation(shown, browser):
    def prune(state):
        kept = [0, 3, 4, 6, 11]
        for name, dim in {"prototype_vectors": 0, "prototype_class": 0, "last_layer.weight": 1}.items():
            state["model"][name] = state["model"][name].index_select(dim, torch.tensor(kept))
        state["prototypes"] = [state["prototypes"][old] | {"prototype": new} for new, old in enumerate(kept)]

    truth = shown(
        "model.prototype_activation_function=linear", "model.distance_scale=1000", place="#x=9,y=9", change=prune
    )
    found = panel(browser)
    assert found["parts"] and max(p for p, _ in found["parts"]) < 5
    check(found, truth)


def test_where_tiles_keep_some_prototypes_the_numbers_are_the_same(shown, browser, monkeypatch):
    monkeypatch.setattr("explanation.pixel_data.TILE", 3)
    monkeypatch.setattr("explanation.image_page.pack", lambda *how: pixel_pack(*how, limit=0))
    truth = shown("dataset.shapes.image_size=101")
    for x, y in [(0, 0), (23, 24), (24, 24), (50, 71), (100, 100)]:
        check(go(browser, x, y), truth)


def test_the_twin_shows_scores_alone(shown, browser):
    truth = shown("model.head=linear", place="#x=9,y=9")
    found = panel(browser)
    assert found["parts"] == [] and found["sum"] is None
    assert all(abs(score - truth.scores[c, 9, 9]) < 1e-3 for c, score in found["scores"])


def test_pictures_load_and_nothing_is_wider_than_the_window(shown, browser, workdir):
    shown()
    for width in (400, 1280):
        browser.execute_cdp_cmd(
            "Emulation.setDeviceMetricsOverride",
            {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False},
        )
        for page in ("001-scene-val-00000.html", "index.html"):
            browser.get((workdir / "out" / page).as_uri())
            assert browser.execute_script("return document.documentElement.scrollWidth") <= width
            broken = "[...document.images].filter((i) => { i.loading = 'eager'; return i.complete && !i.naturalWidth })"
            assert browser.execute_script(f"return {broken}.length") == 0
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
