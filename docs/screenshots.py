"""The pictures of the README, taken in a real browser from a finished quickstart.

Run `qlora ui` in the checkout, then `python docs/screenshots.py` beside it. Needs `pip install selenium` and Debian's
chromium and chromium-driver.
"""

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

from tasks.settings import Settings

MLFLOW = "http://127.0.0.1:5000"
MODEL = "smollm2-tool-caller"
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
    """Take all of them."""
    settings = Settings()
    client = MlflowClient(settings.mlflow_uri)
    experiment = client.get_experiment_by_name(MODEL).experiment_id
    parent, train = (
        client.search_runs([experiment], f"tags.`qlora.{tag}'", order_by=["start_time ASC"])[0].info.run_id
        for tag in ("kind` = 'retrain", "stage` = 'train")
    )
    pages = f"{MLFLOW}/#/experiments/{experiment}/runs"
    report = min(settings.store.glob("evaluate/*/report.html"), key=lambda file: file.stat().st_mtime)
    with browser() as driver:
        shoot(driver, "mlflow-run", f"{pages}/{parent}", 1400, 900)
        shoot(driver, "mlflow-train", f"{pages}/{train}/model-metrics", 1400, 1050)
        shoot(driver, "mlflow-registry", f"{MLFLOW}/#/models/{MODEL}", 1400, 1000)
        shoot(driver, "report", report.resolve().as_uri(), 1200, 1500)


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
    for button in driver.find_elements(
        By.CSS_SELECTOR, "button[aria-label='Close'], button[data-component-id*='close']"
    ):
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
