// Draws a ranking of images into a scrolling grid, a page of tiles at a time. Runs in gradio's HTML component, which
// provides `element`, `props` (value: the JSON of markup.grid) and `watch`.

const PAGE = 60;
const names = () => (window.galleryNames ??= fetch("names").then((answer) => answer.json()));

function tile(name, number, similarity, shared) {
  const link = document.createElement("a");
  link.className = shared ? "tile shared" : "tile";
  link.href = `image/${number}`;
  link.target = "_blank";
  link.title = name;
  const image = document.createElement("img");
  image.loading = "lazy";
  image.src = `thumbnail/${number}`;
  image.alt = name;
  const caption = document.createElement("span");
  caption.textContent = similarity.toFixed(2);
  link.append(image, caption);
  return link;
}

let drawing = 0;

async function draw() {
  const grid = element.querySelector(".grid");
  const id = ++drawing;
  const list = await names();
  if (id !== drawing) return; // a newer ranking came in between
  grid.replaceChildren();
  grid.scrollTop = 0;
  if (!props.value) return;
  const { order, similarities, shared } = JSON.parse(props.value);
  const sharedNumbers = new Set(shared);
  const end = document.createElement("div");
  end.className = "end";
  let next = 0;
  const more = new IntersectionObserver(
    (entries) => {
      if (!entries.some((entry) => entry.isIntersecting)) return;
      const page = order.slice(next, next + PAGE);
      const tiles = page.map((number, place) =>
        tile(list[number], number, similarities[next + place], sharedNumbers.has(number)),
      );
      end.before(...tiles);
      next += page.length;
      more.unobserve(end); // observed anew, an end that is still in view is reported again
      if (next < order.length && grid.isConnected) more.observe(end);
    },
    { root: grid, rootMargin: "400px" },
  );
  grid.append(end);
  more.observe(end);
}

watch("value", draw);
draw();
