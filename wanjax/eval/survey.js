'use strict';
const $ = id => document.getElementById(id);
const study = JSON.parse($('study').textContent);
const SIDES = ['x', 'y'];

// --- digests and chance: crypto.subtle is missing where a page comes by plain http ---
function sha256(text) {
  const primes = [];
  for (let n = 2; primes.length < 64; n++) if (primes.every(p => n % p)) primes.push(n);
  const bits = x => ((x - Math.floor(x)) * 2 ** 32) >>> 0;
  const turn = (x, n) => (x >>> n) | (x << (32 - n));
  const keys = primes.map(p => bits(Math.cbrt(p)));
  const state = primes.slice(0, 8).map(p => bits(Math.sqrt(p)));
  const bytes = new TextEncoder().encode(text);
  const padded = new DataView(new ArrayBuffer(((bytes.length + 72) >> 6) << 6));
  bytes.forEach((byte, i) => padded.setUint8(i, byte));
  padded.setUint8(bytes.length, 0x80);
  padded.setUint32(padded.byteLength - 4, bytes.length * 8);
  for (let at = 0; at < padded.byteLength; at += 64) {
    const w = [];
    for (let i = 0; i < 64; i++) {
      if (i < 16) { w.push(padded.getUint32(at + 4 * i)); continue; }
      const a = w[i - 15], b = w[i - 2];
      w.push((w[i - 16] + w[i - 7] + (turn(a, 7) ^ turn(a, 18) ^ (a >>> 3))
        + (turn(b, 17) ^ turn(b, 19) ^ (b >>> 10))) >>> 0);
    }
    let [a, b, c, d, e, f, g, h] = state;
    for (let i = 0; i < 64; i++) {
      const t = h + (turn(e, 6) ^ turn(e, 11) ^ turn(e, 25)) + ((e & f) ^ (~e & g)) + keys[i] + w[i];
      const u = (turn(a, 2) ^ turn(a, 13) ^ turn(a, 22)) + ((a & b) ^ (a & c) ^ (b & c));
      [a, b, c, d, e, f, g, h] = [(t + u) >>> 0, a, b, c, (d + t) >>> 0, e, f, g];
    }
    [a, b, c, d, e, f, g, h].forEach((x, i) => { state[i] = (state[i] + x) >>> 0; });
  }
  return state.map(x => x.toString(16).padStart(8, '0')).join('');
}

// The generator mulberry32, of which the same rater in the same study gets the same numbers.
function chance(rater) {
  let seed = parseInt(sha256(study.digest + rater).slice(0, 8), 16);
  const next = () => {
    seed = (seed + 0x6D2B79F5) | 0;
    let t = Math.imul(seed ^ (seed >>> 15), 1 | seed);
    t = (t + Math.imul(t ^ (t >>> 7), 61 | t)) ^ t;
    return ((t ^ (t >>> 14)) >>> 0) / 2 ** 32;
  };
  return list => {
    const mixed = [...list];
    for (let i = mixed.length - 1; i > 0; i--) {
      const j = Math.floor(next() * (i + 1));
      [mixed[i], mixed[j]] = [mixed[j], mixed[i]];
    }
    return mixed;
  };
}

// Trials in a rater's order; half of them have their videos swapped.
function order(rater) {
  const shuffled = chance(rater), [first] = shuffled([0, 1]);
  const swaps = shuffled(study.trials.map((_, i) => (i + first) % 2));
  return shuffled(study.trials).map((trial, i) => {
    const [x, y] = swaps[i] ? [...trial.videos].reverse() : trial.videos;
    return { ...trial, trial: trial.id, x, y };
  });
}

// --- what is kept: private windows refuse storage, or throw when it is only looked at ---
const KEY = `survey ${study.digest}`;
let keeps = true;
function read(key) {
  try { return JSON.parse(localStorage.getItem(key)); } catch { return null; }
}
function write(key, value) {
  try {
    if (value === null) localStorage.removeItem(key);
    else localStorage.setItem(key, JSON.stringify(value));
  } catch {
    keeps = false;
    $('kept').hidden = true;
    warn('This window keeps nothing: closing or reloading it loses your answers. Finish in one go, '
      + 'or open the page in an ordinary window.');
  }
}
function warn(text) { $('warning').textContent = text; $('warning').hidden = !text; }

// --- a visit: {rater, began, ended, answers, draft}; answers grow by one, in the rater's order ---
let visit = null, trials = [], saved = false;
const keyOf = rater => `${KEY} ${rater}`;
function stored(rater) {
  const found = read(keyOf(rater));
  const whole = found && found.rater === rater && found.draft && Array.isArray(found.answers)
    && found.answers.every((answer, i) => trials[i] && answer.trial === trials[i].trial);
  return whole ? found : null;
}

// Another tab may be ahead; then this one follows, and what it had of that pair is not sent.
function follow() {
  const found = visit && stored(visit.rater);
  if (!found || found.answers.length <= visit.answers.length) return false;
  visit = found;
  show();
  $('said').textContent = 'That pair was answered in another tab; here you go on from there.';
  return true;
}
function change(edit) {
  if (follow()) return;
  edit();
  write(keyOf(visit.rater), visit);
}

function begin(rater) {
  trials = order(rater);
  const fresh = { rater, began: new Date().toISOString(), ended: null, answers: [], draft: {} };
  visit = stored(rater) || fresh;
  write(KEY, rater);
  change(() => {});
  show();
}

function result() {
  const file = { format: 'wanjax survey answers', version: 1, study: study.digest,
    rater: visit.rater, began: visit.began, ended: visit.ended, answers: visit.answers };
  return { ...file, digest: sha256(JSON.stringify(file)) };
}

// --- two films on one clock: the first leads, the other is brought to it; both start over together
// when the shorter one ends, as two videos that loop by themselves drift apart ---
const films = [$('film-x'), $('film-y')];
let playing = false, moving = false, turn = 0, frame = 1 / 24, resumes = false;

const once = (film, name) => new Promise(done => {
  film.addEventListener(name, done, { once: true });
  setTimeout(done, 1500);
});
async function seek(time) {
  films.forEach(film => { film.pause(); film.playbackRate = 1; });
  const sought = films.map(film => once(film, 'seeked'));
  films.forEach(film => { film.currentTime = time; });
  await Promise.all(sought);
}
async function play(time) {
  const own = ++turn;
  moving = true;
  await seek(time);
  if (own !== turn) return;
  try {
    await Promise.all(films.map(film => film.play()));
    if (own === turn) setPlaying(true);
  } catch { // phones want a tap first
    if (own !== turn) return;
    pause();
    $('tap').hidden = films.some(film => film.error);
  }
  if (own === turn) moving = false;
}
function pause() {
  turn++;
  moving = false;
  films.forEach(film => film.pause());
  setPlaying(false);
}
function setPlaying(on) {
  playing = on;
  $('play').textContent = on ? 'Pause' : 'Play';
  if (on) $('tap').hidden = true;
}
// From a server films come whole before they are shown, so that neither of two has to wait.
async function address(file) {
  const url = `videos/${file}`;
  if (location.protocol === 'file:') return url;
  const found = await fetch(url);
  if (!found.ok) throw new Error(found.status);
  return URL.createObjectURL(await found.blob());
}
async function load(trial) {
  pause();
  const own = turn;
  frame = 1 / trial.fps;
  $('tap').hidden = true;
  document.body.style.setProperty('--aspect', trial.aspect);
  films.forEach(film => { URL.revokeObjectURL(film.src); film.removeAttribute('src'); });
  try {
    const found = await Promise.all(SIDES.map(side => address(trial[side])));
    if (own !== turn) return;
    const ready = films.map(film => once(film, 'loadeddata'));
    films.forEach((film, i) => { film.src = found[i]; });
    await Promise.all(ready);
    if (own === turn) play(0);
  } catch {
    if (own === turn) fail();
  }
}
function fail() {
  $('said').textContent = 'A video of this pair does not play here. Reload the page, try another '
    + 'browser, or check that the folder "videos" lies beside this page.';
}
function tick() {
  requestAnimationFrame(tick);
  if (!playing || moving) return;
  const [lead, other] = films, gap = lead.currentTime - other.currentTime;
  const end = Math.min(lead.duration, other.duration);
  if (films.some(film => film.ended || film.currentTime >= end - frame / 4)) {
    change(() => { visit.draft.loops = (visit.draft.loops || 0) + 1; });
    check();
    if (playing) play(0);
  } else if (Math.abs(gap) > 6 * frame) play(lead.currentTime);
  else other.playbackRate = Math.abs(gap) < frame / 8 ? 1 : Math.min(1.2, Math.max(.8, 1 + 3 * gap));
}
document.addEventListener('visibilitychange', () => {
  if (document.hidden) {
    resumes = playing;
    pause();
  } else if (!follow() && resumes) play(films[0].currentTime);
});
films.forEach(film => film.addEventListener('error', () => { if (film.error) fail(); }));

// --- questions ---
const rows = [];
function radio(name, value, text) {
  const label = document.createElement('label'), input = document.createElement('input');
  Object.assign(input, { type: 'radio', name, value });
  label.append(input, text);
  return label;
}
function row(name, legend, labels, mark) {
  const set = document.createElement('fieldset'), title = document.createElement('legend');
  title.textContent = legend;
  set.append(title, ...(mark ? [mark] : []), ...labels);
  set.dataset.name = name;
  set.addEventListener('change', event => answer(set, event.target.value));
  set.addEventListener('focusin', () => activate(set));
  rows.push(set);
  return set;
}
function question(one, parts) {
  const box = document.createElement('section'), head = document.createElement('div');
  const title = document.createElement('h2'), text = document.createElement('p');
  title.textContent = one.title;
  text.textContent = one.text;
  text.className = 'soft';
  head.append(title, text);
  box.className = 'question';
  box.append(head, ...parts);
  $('questions').append(box);
}
function build() {
  const words = study.scale;
  for (const one of study.questions) {
    question({ title: one.title, text: `${one.text} 1 ${words[0]}, 5 ${words[4]}.` },
      SIDES.map(side => {
        const name = `${one.id}-${side}`, mark = document.createElement('b');
        mark.textContent = side.toUpperCase();
        const labels = words.map((word, i) => {
          const label = radio(name, i + 1, String(i + 1));
          label.title = word;
          label.firstChild.setAttribute('aria-label', `${i + 1}, ${word}`);
          return label;
        });
        return row(name, `${one.title}, video ${side.toUpperCase()}`, labels, mark);
      }));
  }
  const labels = SIDES.map(side => radio('choice', side, side.toUpperCase()));
  const last = row('choice', study.choice.text, labels);
  last.className = 'choice';
  question(study.choice, [last]);
}
function activate(set) { rows.forEach(other => other.classList.toggle('active', other === set)); }
function markedRow() { return rows.find(set => set.classList.contains('active')); }
function answer(set, value) {
  change(() => { visit.draft[set.dataset.name] = value; });
  const open = rows.find(other => !visit.draft[other.dataset.name]);
  activate(open || set);
  check();
}
// Empty and half answered pairs cannot be sent, nor those that were not watched to their end.
function check() {
  const open = rows.filter(set => !visit.draft[set.dataset.name]).length;
  const unseen = !visit.draft.loops;
  const words = [];
  if (unseen) words.push('Watch both to the end first.');
  if (open) words.push(open === 1 ? 'One answer is missing.' : `${open} answers are missing.`);
  $('missing').textContent = words.join(' ');
  $('send').disabled = unseen || open > 0;
}
function send() {
  if ($('send').disabled || follow()) return;
  const { draft } = visit, { trial, x, y } = trials[visit.answers.length];
  const answer = { trial, x, y };
  for (const { id } of study.questions) answer[id] = SIDES.map(side => Number(draft[`${id}-${side}`]));
  answer.choice = draft.choice;
  answer.loops = draft.loops;
  change(() => {
    visit.answers.push(answer);
    visit.draft = {};
    if (visit.answers.length === trials.length) visit.ended = new Date().toISOString();
  });
  show();
}

// --- pages ---
function show() {
  const number = visit ? visit.answers.length : 0, done = visit && number === trials.length;
  $('welcome').hidden = Boolean(visit);
  $('pair').hidden = !visit || done;
  $('done').hidden = !done;
  window.scrollTo(0, 0);
  if (!visit) {
    $('rater').focus();
    return;
  }
  if (done) {
    pause();
    $('text').value = JSON.stringify(result());
    $('save').focus();
    return;
  }
  $('where').textContent = `Pair ${number + 1} of ${trials.length}`;
  Object.assign($('progress'), { max: trials.length, value: number });
  $('send').textContent = number + 1 === trials.length ? 'Finish' : 'Next pair';
  $('said').textContent = '';
  for (const set of rows) for (const input of set.querySelectorAll('input'))
    input.checked = visit.draft[set.dataset.name] === input.value;
  if (document.activeElement) document.activeElement.blur();
  activate(rows.find(set => !visit.draft[set.dataset.name]) || rows[0]);
  check();
  load(trials[number]);
}
function save() {
  const link = document.createElement('a');
  link.href = URL.createObjectURL(new Blob([JSON.stringify(result(), null, 1) + '\n'],
    { type: 'application/json' }));
  link.download = `answers_${visit.rater.replace(/[^\p{L}\p{N}]+/gu, '_')}.json`;
  link.click();
  saved = true;
  $('saved').textContent = `${link.download} is among your downloads.`;
  $('save').disabled = true; // a double click saves one file
  setTimeout(() => { $('save').disabled = false; }, 1500);
}
function key(event) {
  if (event.ctrlKey || event.altKey || event.metaKey || $('pair').hidden) return;
  const marked = markedRow(), name = event.key.toLowerCase();
  const pick = (set, value) => {
    const input = set && set.querySelector(`input[value="${value}"]`);
    if (!input) return;
    input.checked = true;
    answer(set, String(value));
    markedRow().scrollIntoView({ block: 'nearest' });
  };
  const move = step => {
    activate(rows[Math.min(rows.length - 1, Math.max(0, rows.indexOf(marked) + step))]);
    markedRow().scrollIntoView({ block: 'nearest' });
  };
  const onButton = event.target.closest && event.target.closest('button');
  if ('12345'.includes(name)) pick(marked, name);
  else if (name === 'x' || name === 'y') pick(rows[rows.length - 1], name);
  else if (name === 'arrowup') move(-1);
  else if (name === 'arrowdown') move(1);
  else if (name === 'r') play(0);
  else if (name === ' ' && !onButton) $('play').click();
  else if (name === 'enter' && !onButton && !event.repeat) send();
  else return;
  event.preventDefault();
}

$('count').textContent = study.trials.length;
$('begin').addEventListener('submit', event => {
  event.preventDefault();
  const rater = $('rater').value.normalize('NFC').trim().replace(/\s+/g, ' ');
  if (rater) begin(rater);
});
$('play').addEventListener('click', () => (playing ? pause() : play(films[0].currentTime)));
$('tap').addEventListener('click', () => play(0));
$('again').addEventListener('click', () => play(0));
$('send').addEventListener('click', send);
$('save').addEventListener('click', save);
$('other').addEventListener('click', () => { visit = null; saved = false; write(KEY, null); show(); });
document.addEventListener('keydown', key);
window.addEventListener('storage', follow);
window.addEventListener('focus', follow);
window.addEventListener('beforeunload', event => {
  if (!keeps && visit && !saved) event.preventDefault();
});
build();
write(`${KEY} probe`, 1);
write(`${KEY} probe`, null);
const before = read(KEY);
if (before) begin(before);
else show();
tick();
