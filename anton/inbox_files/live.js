// Shows a page anew every two seconds, what is marked data-live in it; without JavaScript the page reloads as a whole.
"use strict";
const live = document.querySelector("[data-live]");
const again = async () => {
  try {
    if (!document.hidden) {
      const answer = await fetch(location.href, {cache: "no-store", redirect: "error"});
      if (!answer.ok) return;
      const page = new DOMParser().parseFromString(await answer.text(), "text/html").querySelector("[data-live]");
      if (page && page.innerHTML !== live.innerHTML) live.innerHTML = page.innerHTML;
    }
  } catch { /* the server is away for a moment */ }
  setTimeout(again, 2000);
};
if (live) setTimeout(again, 2000);
