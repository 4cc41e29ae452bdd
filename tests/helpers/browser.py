"""A headless Chromium."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from selenium import webdriver

from helpers.places import MARK, WHOLE_RUN

FLAGS = [
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
]


def start_browser(folder, *flags):
    """Start one with its profile in this folder; skip the test where none is installed."""
    driver = shutil.which("chromedriver")
    if not driver or not shutil.which("chromium"):
        pytest.skip("no browser: chromium and chromedriver are not installed")
    options = webdriver.ChromeOptions()
    options.binary_location = str(Path(__file__).with_name("browser.sh"))
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    for flag in [*FLAGS, f"--user-data-dir={folder}", *flags]:
        options.add_argument(flag)
    env = {**os.environ, MARK: f"{WHOLE_RUN}/browser"}
    service = webdriver.ChromeService(driver, log_output=subprocess.DEVNULL, env=env)
    browser = webdriver.Chrome(options, service)
    browser.set_script_timeout(60)
    return browser
