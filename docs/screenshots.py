"""The pictures of the README, taken in a real browser from a quickstart that waits for approval.

In the checkout, `qlora ui`; beside it, with PREFECT_API_URL=http://127.0.0.1:4200/api and
MLFLOW_TRACKING_URI=http://127.0.0.1:5000:

    prefect work-pool create care --type process
    prefect --no-prompt deploy --name approval --prefect-file deployments/prefect.yaml
    prefect worker start --pool care                                                   # stays
    qlora run deployments/recipes/quickstart.yaml --set promotion.approval=manual
    python docs/screenshots.py [--model NAME] [--only approval-form]

The last fills the form in and submits it. Needs `pip install selenium` and Debian's chromium and chromium-driver.
"""

import argparse
import os
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from mlflow import MlflowClient
from selenium import webdriver
from selenium.common.exceptions import TimeoutException, WebDriverException
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import Select, WebDriverWait

from tasks.approval import AWAITING
from tasks.registry import ModelRegistry
from tasks.settings import Settings

IMAGES = Path(__file__).parent / "images"
PATIENCE_S = 12
CLOSE_BUTTONS = "button[aria-label='Close'], button[data-component-id*='close']"
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--hide-scrollbars",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


def main() -> None:
    """Take all of them, or those that are named."""
    arguments, settings = _arguments(), Settings()
    with browser() as driver:
        if "approval-form" in arguments.only:
            take_approval_form(driver, ModelRegistry(settings), arguments.model)
        for name, (address, width, height) in _pages(settings, arguments.model).items():
            if name in arguments.only:
                shoot(driver, name, address, width, height)


def take_approval_form(driver: webdriver.Chrome, registry: ModelRegistry, model: str) -> None:
    """Fill in the form of the version that waits, keep the picture, and submit it."""
    version = next(found for found in registry.versions(model) if found.tags.get("qlora.verdict") == AWAITING)
    prefect = os.environ["PREFECT_API_URL"].removesuffix("/api")
    driver.set_window_size(1400, 1100)
    page = f"{prefect}/runs/flow-run/{version.tags['qlora.approval_run']}"
    button = answer_form(driver, page, "approve", "Ada", "answers that end by themselves")
    driver.save_screenshot(str(IMAGES / "approval-form.png"))
    submit(driver, button)


def _pages(settings: Settings, model: str) -> dict[str, tuple[str, int, int]]:
    """Address, width and height by name: the model's first retraining, its training, its versions, its report."""
    client = MlflowClient(settings.mlflow_uri)
    experiment = client.get_experiment_by_name(model).experiment_id
    parent, train = (
        client.search_runs([experiment], f"tags.`qlora.{tag}'", order_by=["start_time ASC"])[0].info.run_id
        for tag in ("kind` = 'retrain", "stage` = 'train")
    )
    pages = f"{settings.mlflow_uri}/#/experiments/{experiment}/runs"
    report = min(settings.store.glob("evaluate/*/report.html"), key=lambda file: file.stat().st_mtime)
    return {
        "mlflow-run": (f"{pages}/{parent}", 1400, 900),
        "mlflow-train": (f"{pages}/{train}/model-metrics", 1400, 1050),
        "mlflow-registry": (f"{settings.mlflow_uri}/#/models/{model}", 1400, 1000),
        "report": (report.resolve().as_uri(), 1200, 1500),
    }


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="the pictures of the README")
    parser.add_argument("--model", default="smollm2-tool-caller")
    names = ["approval-form", "mlflow-run", "mlflow-train", "mlflow-registry", "report"]
    parser.add_argument("--only", nargs="+", choices=names, default=names)
    return parser.parse_args()


def browser() -> webdriver.Chrome:
    """A fresh headless Chromium."""
    options = webdriver.ChromeOptions()
    for flag in (*FLAGS, f"--user-data-dir={tempfile.mkdtemp()}"):
        options.add_argument(flag)
    return webdriver.Chrome(options=options, service=webdriver.ChromeService("/usr/bin/chromedriver"))


def shoot(driver: webdriver.Chrome, name: str, address: str, width: int, height: int) -> None:
    """Open a page, close what covers it, wait for its charts, and keep the picture."""
    driver.set_window_size(width, height)
    driver.get(address)
    time.sleep(PATIENCE_S)
    for button in driver.find_elements(By.CSS_SELECTOR, CLOSE_BUTTONS):
        click(button)
    time.sleep(PATIENCE_S / 4)
    driver.save_screenshot(str(IMAGES / f"{name}.png"))


def answer_form(driver: webdriver.Chrome, flow_run_url: str, decision: str, name: str, reason: str) -> WebElement:
    """Open the form of a suspended flow run and fill it in; returns the button that submits it."""
    wait = WebDriverWait(driver, 60)
    driver.get(flow_run_url)
    wait.until(lambda page: _buttons(page, "Resume"))[0].click()
    dialog = wait.until(lambda page: page.find_elements(By.CSS_SELECTOR, "[role=dialog] select"))[0]
    Select(dialog).select_by_value(decision)
    for field, text in zip(
        driver.find_elements(By.CSS_SELECTOR, "[role=dialog] textarea"), (name, reason), strict=True
    ):
        field.send_keys(text)
    return _buttons(driver, "Submit")[0]


def submit(driver: webdriver.Chrome, button: WebElement) -> None:
    """Submit a form; Prefect keeps it open when its own database was busy, and a person would press again."""
    for _ in range(5):
        button.click()
        with suppress(TimeoutException):
            WebDriverWait(driver, 20).until(lambda page: not page.find_elements(By.CSS_SELECTOR, "[role=dialog]"))
            return
    raise TimeoutError("Prefect did not take the answer")


def _buttons(driver: webdriver.Chrome, text: str) -> list[WebElement]:
    return [button for button in driver.find_elements(By.TAG_NAME, "button") if button.text == text]


def click(element: WebElement) -> None:
    """Press what can be pressed; what cannot was not covering anything."""
    try:
        element.click()
    except WebDriverException:
        return


if __name__ == "__main__":
    main()
