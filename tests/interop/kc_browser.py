"""What a person does in a browser at Keycloak's pages."""

from selenium.webdriver import Chrome
from selenium.webdriver.common.by import By
from selenium.webdriver.support.wait import WebDriverWait

from tests.interop.kc_server import PASSWORD, USERNAME
from tests.support.browser import PAGE_SECONDS


def log_in(driver: Chrome) -> None:
    """Fill in Keycloak's login form."""
    wait_for(driver, "username")
    driver.find_element(By.ID, "username").send_keys(USERNAME)
    driver.find_element(By.ID, "password").send_keys(PASSWORD)
    driver.find_element(By.ID, "kc-login").click()


def grant(driver: Chrome) -> None:
    """Say yes to what the device asks for."""
    wait_for(driver, "kc-oauth")
    driver.find_element(By.NAME, "accept").click()


def wait_for(driver: Chrome, element: str) -> None:
    WebDriverWait(driver, PAGE_SECONDS).until(
        lambda driver: driver.find_elements(By.ID, element), f"no #{element} in:\n{driver.page_source}"
    )


def wait_for_text(driver: Chrome, text: str) -> str:
    """Wait until the page shows a text, and return all it shows."""
    WebDriverWait(driver, PAGE_SECONDS).until(lambda driver: text in driver.page_source, text)
    return str(driver.find_element(By.TAG_NAME, "body").text)
