"A headless Chromium for tests, driven by its DevTools protocol over a pipe: nothing but the standard library."
import base64, fcntl, json, os, select, shutil, subprocess, tempfile, time

NAMES = ('chromium', 'chromium-browser', 'google-chrome')
FLAGS = ('--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking '
         '--disable-component-update --disable-sync --disable-extensions --disable-dev-shm-usage '
         '--hide-scrollbars --remote-debugging-pipe')

def chromium():
    "The browser's program, or None."
    return next(filter(None, map(shutil.which, NAMES)), None)

def high(fd):
    "The same file under a number that the browser's own two do not need."
    return fcntl.fcntl(fd, fcntl.F_DUPFD, 10)

class Browser:
    "One page of a browser; `requests`, `errors` hold what it asked for and complained of since it was opened."
    def __init__(self):
        self.profile, self.n, self.inbox = tempfile.mkdtemp(prefix='synthscale-browser-'), 0, b''
        (theirs, out), (back, ours) = os.pipe(), os.pipe()
        reads, writes = high(theirs), high(ours)
        command = [chromium(), *FLAGS.split(), f'--user-data-dir={self.profile}', 'about:blank']
        self.process = subprocess.Popen(command, close_fds=False, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                                        preexec_fn=lambda: (os.dup2(reads, 3), os.dup2(writes, 4)))
        self.out, self.back, self.session = out, back, {}
        for fd in (theirs, ours, reads, writes):
            os.close(fd)
        self.clear()
        target = self.ask('Target.createTarget', url='about:blank')['targetId']
        self.session = {'sessionId': self.ask('Target.attachToTarget', targetId=target, flatten=True)['sessionId']}
        for domain in ('Page', 'Runtime', 'Network', 'Log'):
            self.ask(f'{domain}.enable')

    def clear(self):
        "Forget what was seen."
        self.requests, self.errors, self.loaded = [], [], False

    def close(self):
        "End the browser and take its profile away."
        self.process.terminate()
        self.process.wait(60)
        os.close(self.out)
        os.close(self.back)
        shutil.rmtree(self.profile, ignore_errors=True)

    def _message(self, seconds):
        "The next message of the browser."
        end = time.monotonic()+seconds
        while b'\0' not in self.inbox:
            ready, _, _ = select.select([self.back], [], [], max(end-time.monotonic(), 0))
            data = os.read(self.back, 1 << 20) if ready else b''
            if not data: raise TimeoutError('the browser does not answer')
            self.inbox += data
        message, self.inbox = self.inbox.split(b'\0', 1)
        return json.loads(message)

    def _note(self, m):
        "Keep what an event says."
        kind, p = m.get('method'), m.get('params', {})
        if kind == 'Network.requestWillBeSent':
            self.requests += [u for u in [p['request']['url']] if not u.startswith('data:')]
        elif kind == 'Runtime.exceptionThrown':
            self.errors.append(p['exceptionDetails']['text'])
        elif kind == 'Runtime.consoleAPICalled' and p['type'] in ('error', 'warning'):
            self.errors.append(str(p['args']))
        elif kind == 'Log.entryAdded' and p['entry']['level'] in ('error', 'warning'):
            self.errors.append(p['entry']['text'])
        elif kind == 'Page.loadEventFired':
            self.loaded = True

    def ask(self, method, seconds=60, **params):
        "What the browser answers."
        self.n += 1
        os.write(self.out, json.dumps(dict(id=self.n, method=method, params=params, **self.session)).encode()+b'\0')
        while True:
            m = self._message(seconds)
            if m.get('id') == self.n:
                assert 'error' not in m, m
                return m['result']
            self._note(m)

    def open(self, path, width=1280, height=800, dark=False, script=True):
        "Show a file at a size and in a theme."
        scheme = [dict(name='prefers-color-scheme', value='dark' if dark else 'light')]
        self.ask('Emulation.setDeviceMetricsOverride', width=width, height=height, deviceScaleFactor=1,
                 mobile=width < 600)
        self.ask('Emulation.setEmulatedMedia', features=scheme)
        self.ask('Emulation.setScriptExecutionDisabled', value=not script)
        self.clear()
        self.ask('Page.navigate', url=path.resolve().as_uri())
        while not self.loaded:
            self._note(self._message(60))

    def run(self, expression):
        "The value of a JavaScript expression."
        r = self.ask('Runtime.evaluate', expression=expression, returnByValue=True, awaitPromise=True)
        assert 'exceptionDetails' not in r, r
        return r['result'].get('value')

    def click(self, selector):
        "Click what a selector finds, as a mouse does."
        at = self.run(f"(e => {{ e.scrollIntoView({{block: 'center'}}); const r = e.getBoundingClientRect(); "
                      f"return [r.x+r.width/2, r.y+r.height/2]; }})(document.querySelector({selector!r}))")
        for kind in ('mousePressed', 'mouseReleased'):
            self.ask('Input.dispatchMouseEvent', type=kind, x=at[0], y=at[1], button='left', clickCount=1)

    def press(self, key, code):
        "Press a key."
        text = {'text': '\r'} if key == 'Enter' else {}
        for kind in ('keyDown', 'keyUp'):
            self.ask('Input.dispatchKeyEvent', type=kind, key=key, windowsVirtualKeyCode=code,
                     **(text if kind == 'keyDown' else {}))

    def picture(self, path, whole=True):
        "Write what is shown, or the whole page, as PNG."
        data = self.ask('Page.captureScreenshot', captureBeyondViewport=whole, seconds=120)['data']
        path.write_bytes(base64.b64decode(data))
