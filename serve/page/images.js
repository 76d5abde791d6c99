// Images of a question: read, made smaller only where the server says that it takes no larger ones.
const FACTOR = 28; // pixels of a side of what becomes one token: a patch of 14, merged 2 by 2
const LEAST_PIXELS = 4 * FACTOR ** 2, LEAST_BYTES = 16_000; // less is not worth sending
const TEXT_BYTES = 64_000; // of a request, kept for its words

const dataUrl = (blob) => new Promise((resolve, reject) => {
  const reader = new FileReader();
  reader.addEventListener("load", () => resolve(reader.result));
  reader.addEventListener("error", () => reject(reader.error));
  reader.readAsDataURL(blob);
});

const LOSSLESS = ["image/png", "image/webp", "image/gif", "image/bmp"];
const SENT = ["image/jpeg", ...LOSSLESS]; // others, as HEIC of a phone, go as JPEG: a server may not read them

const redrawn = async (bitmap, type, pixels) => {
  const scale = Math.min(1, Math.sqrt(pixels / (bitmap.width * bitmap.height)));
  const [width, height] = [bitmap.width, bitmap.height].map((side) => Math.max(1, Math.floor(side * scale)));
  const canvas = make("canvas", { width, height }), context = canvas.getContext("2d");
  context.imageSmoothingQuality = "high";
  context.drawImage(bitmap, 0, 0, width, height);
  const kind = LOSSLESS.includes(type) ? "image/png" : "image/jpeg";
  const blob = await new Promise((resolve) => canvas.toBlob(resolve, kind, 0.95));
  return { blob, width, height };
};

// What the server's limits on one request leave: pixels, and bytes of its body, beside images that it holds already.
const roomOf = (images, { max_pixels: pixels = Infinity, max_body_bytes: bytes = Infinity }) => ({
  pixels: images.reduce((left, image) => left - image.width * image.height, pixels),
  bytes: images.reduce((left, image) => left - image.data.length, bytes - TEXT_BYTES),
});

const dataBytes = (blob) => 4 * Math.ceil(blob.size / 3) + 100; // in base64, and what is around it

// An image as it is sent: {name, width, height, from, url, data, tokens}; `from` tells where it was made smaller.
const readImage = async (file, room) => {
  if (room.pixels < LEAST_PIXELS || room.bytes < LEAST_BYTES) {
    throw new Trouble("The images are together as large as the server takes: remove one, or begin a new chat.", "close");
  }
  let bitmap;
  try {
    bitmap = await createImageBitmap(file);
  } catch {
    throw new Trouble(`“${file.name}” is not an image that this browser can read.`, "close");
  }
  const { width, height } = bitmap, fits = width * height <= room.pixels && SENT.includes(file.type);
  let kept = fits ? { blob: file, width, height } : await redrawn(bitmap, file.type, room.pixels);
  while (dataBytes(kept.blob) > room.bytes && kept.width * kept.height > LEAST_PIXELS) {
    // As JPEG it may do at its own size; a JPEG has to have fewer pixels.
    const share = kept.blob.type === "image/jpeg" ? Math.min(0.9, room.bytes / dataBytes(kept.blob)) : 1;
    kept = await redrawn(bitmap, "image/jpeg", kept.width * kept.height * share);
  }
  bitmap.close();
  const from = kept.width === width && kept.height === height ? null : `made smaller from ${width} × ${height}`;
  return { name: file.name, ...kept, from, url: URL.createObjectURL(kept.blob), data: await dataUrl(kept.blob), tokens: null };
};

const sizeOf = (image) => `${image.width} × ${image.height}`;

// Gives each image its tokens, where they are certain: one image has them all; several have those of their sizes in
// whole squares of FACTOR, if that adds up to what the server counted.
const shareTokens = (images, total) => {
  const squares = ({ width, height }) => Math.round(width / FACTOR) * Math.round(height / FACTOR);
  const shares = images.length === 1 ? [total] : images.map(squares);
  const certain = shares.reduce((sum, share) => sum + share, 0) === total;
  images.forEach((image, at) => { image.tokens = certain ? shares[at] : null; });
};

const pictureOf = (image, name = image.name) => button(make("img", { src: image.url, alt: name, width: image.width, height: image.height }), () => {
  const dialog = byId("picture");
  Object.assign(dialog.querySelector("img"), { src: image.url, alt: name });
  dialog.querySelector("p").textContent = [name, sizeOf(image), image.from].filter(Boolean).join(", ");
  dialog.showModal();
}, { className: "look", title: "Look at it larger" });
