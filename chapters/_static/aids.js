// Aids for readers: the learning path of their choice, and names and focus where the theme has none.
(() => {
  const KEY = "book-path";
  const chosen = () => { try { return localStorage.getItem(KEY) || ""; } catch { return ""; } };
  const choose = (path) => { try { localStorage.setItem(KEY, path); } catch { /* not remembered */ } };

  // The foot of a chapter: the links of one path stand where the order of the book stood.
  const nav = document.querySelector(".path-nav");
  if (nav) {
    const select = nav.querySelector("select");
    const paths = [...nav.querySelectorAll(".path-links")];
    const book = document.querySelector(".prev-next-footer");
    const show = (path) => {
      const mine = paths.some((links) => links.dataset.path === path) ? path : "";
      select.value = mine;
      for (const links of paths) links.hidden = links.dataset.path !== mine;
      if (book) book.hidden = mine !== "";
    };
    select.addEventListener("change", () => { choose(select.value); show(select.value); });
    show(chosen());
    nav.hidden = false;
  }

  // The page of the paths: one button each; pressed again, it lets go.
  const picks = [...document.querySelectorAll(".path-pick")];
  const press = () => {
    for (const pick of picks) {
      const on = pick.closest(".path").dataset.path === chosen();
      pick.setAttribute("aria-pressed", on);
      pick.textContent = on ? "You follow this path" : "Follow this path";
    }
  };
  for (const pick of picks) {
    pick.hidden = false;
    pick.addEventListener("click", () => {
      const path = pick.closest(".path").dataset.path;
      choose(path === chosen() ? "" : path);
      press();
    });
  }
  press();

  // The theme's buttons: an icon's title would become text that the button's name does not have.
  for (const icon of document.querySelectorAll("button i[title]")) icon.removeAttribute("title");
  for (const button of document.querySelectorAll(".search-button-field")) button.removeAttribute("aria-label");

  // An equation wider than the page scrolls; the keyboard must reach it. Others are no stop.
  const equations = [...document.querySelectorAll("div.math, span.math.long")];
  const reach = () => {
    for (const box of equations) {
      if (box.scrollWidth > box.clientWidth + 1) box.tabIndex = 0;
      else box.removeAttribute("tabindex");
    }
  };
  let waiting;
  addEventListener("resize", () => { clearTimeout(waiting); waiting = setTimeout(reach, 100); });
  document.addEventListener("toggle", reach, true);  // equations inside a fold have no size yet
  (document.fonts ? document.fonts.ready : Promise.resolve()).then(reach);
  reach();
})();
