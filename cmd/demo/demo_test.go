//go:build unix

package main

import (
	"bufio"
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/coder/websocket"
)

// nodePackages has the lock file and, after npm ci, the packages of the tests.
const nodePackages = "../../testdata/node"

// The whole of it as a user sees it: go build, the printed URL, a browser,
// Ctrl-C.
func TestPageInBrowser(t *testing.T) {
	d := startDemo(t, buildDemo(t), "--listen", "127.0.0.1:0", "--admin", "127.0.0.1:0")
	browse(t, d, "testdata/page.mjs")
	d.interrupt(t)
}

// People type on while the backends that they talk to are restarted.
func TestRestartInBrowser(t *testing.T) {
	d := startDemo(t, testBinary(t), "--listen", "127.0.0.1:0", "--admin", "127.0.0.1:0")
	browse(t, d, "testdata/restart.mjs")
	d.interrupt(t)
	d.awaitNoBackend(t) // the processes are others by now
}

// browse runs a script that drives Chromium over the demo's page.
func browse(t *testing.T, d *demo, script string) {
	t.Helper()
	node, err := exec.LookPath("node")
	if err != nil {
		t.Fatalf("this test needs Node.js: %v", err)
	}
	browser := os.Getenv("CHROMIUM")
	if browser == "" {
		browser = "/usr/bin/chromium"
	}
	if _, err := os.Stat(browser); err != nil {
		t.Fatalf("this test needs Chromium: %v (apt-get install chromium, or name another one in $CHROMIUM)", err)
	}
	packages, err := filepath.Abs(nodePackages)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(filepath.Join(packages, "node_modules", "playwright-core")); err != nil {
		t.Fatalf("this test needs playwright-core: %v (npm ci --prefix testdata/node)", err)
	}
	screenshots := os.Getenv("HOLDFAST_SCREENSHOTS")
	if screenshots == "" {
		screenshots = t.TempDir()
	}

	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	drive := exec.CommandContext(ctx, node, script, d.url, packages, screenshots, browser)
	out, err := drive.CombinedOutput()
	if err != nil {
		t.Errorf("driving the page: %v\n%s", err, out)
	} else if len(out) > 0 {
		t.Logf("%s", out)
	}
}

func TestRegistryIsReadOnlyFromOutside(t *testing.T) {
	d := startDemo(t, testBinary(t), "--listen", "0", "--admin", "0")
	for _, test := range []struct {
		method, path string
		status       int
	}{
		{http.MethodGet, "/connections?limit=50", http.StatusOK},
		{http.MethodGet, "/connections?limit=x", http.StatusBadRequest},
		{http.MethodDelete, "/connections?state=open", http.StatusMethodNotAllowed},
		{http.MethodPost, "/connections/drain", http.StatusMethodNotAllowed},
		{http.MethodGet, "/config/", http.StatusNotFound},
		{http.MethodGet, "/connections/%2e%2e/config/", http.StatusNotFound},
		{http.MethodGet, "/ws", http.StatusNotFound},
		{http.MethodGet, "/", http.StatusOK},
	} {
		request, err := http.NewRequestWithContext(t.Context(), test.method, d.url+test.path, nil)
		if err != nil {
			t.Fatal(err)
		}
		// What a browser adds, and Caddy's admin API refuses.
		request.Header.Set("Origin", d.url)
		request.Header.Set("Referer", d.url+"/")
		request.Header.Set("Sec-Fetch-Mode", "cors")
		response, err := http.DefaultClient.Do(request)
		if err != nil {
			t.Fatal(err)
		}
		_, _ = io.Copy(io.Discard, response.Body)
		response.Body.Close()
		if got, want := response.StatusCode, test.status; got != want {
			t.Errorf("%s %s: got %d, want %d", test.method, test.path, got, want)
		}
	}
	d.interrupt(t)
}

func TestInterruptClosesWebSockets(t *testing.T) {
	d := startDemo(t, testBinary(t), "--listen", "127.0.0.1:0", "--admin", "127.0.0.1:0")
	conn := dial(t, strings.TrimPrefix(d.url, "http://"), nil)
	if greeting := receive[hello](t, conn); greeting.Connection == "" {
		t.Errorf("got greeting %+v, want one with the connection's id", greeting)
	}
	d.interrupt(t)
	if got, want := closeStatus(t, conn), websocket.StatusServiceRestart; got != want {
		t.Errorf("got close code %d, want %d", got, want)
	}
}

func TestKilledDemoLeavesNoBackend(t *testing.T) {
	d := startDemo(t, testBinary(t), "--listen", "127.0.0.1:0", "--admin", "127.0.0.1:0")
	if err := d.cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	d.awaitEnd(t)
	d.awaitNoBackend(t)
}

func TestTakenPortNamesItsFlag(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	taken := ln.Addr().String()
	for _, test := range []struct{ flag, listen, admin string }{
		{"--listen", taken, "127.0.0.1:0"},
		{"--admin", "127.0.0.1:0", taken},
	} {
		err := runDemo(test.listen, test.admin, io.Discard)
		if err == nil || !strings.HasPrefix(err.Error(), test.flag+" "+taken) {
			t.Errorf("got error %v, want one that starts with %s %s", err, test.flag, taken)
		}
	}
}

// demo is a running demo process, and what it has printed about itself.
type demo struct {
	cmd      *exec.Cmd
	url      string
	backends []string      // addresses
	pids     []int         // of the backends
	scratch  string        // where it may leave files while it runs
	done     chan struct{} // closed by drain when the process has ended
	err      error         // how it ended; read it after done
}

func buildDemo(t *testing.T) string {
	t.Helper()
	binary := filepath.Join(t.TempDir(), "demo")
	if out, err := exec.Command("go", "build", "-o", binary, ".").CombinedOutput(); err != nil {
		t.Fatalf("building the demo: %v\n%s", err, out)
	}
	return binary
}

func testBinary(t *testing.T) string {
	t.Helper()
	binary, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	return binary
}

var (
	backendLine = regexp.MustCompile(`^backend (?:alder|birch) on (\S+), process (\d+)$`)
	openLine    = regexp.MustCompile(`^open (http://\S+)$`)
)

func startDemo(t *testing.T, binary string, args ...string) *demo {
	t.Helper()
	d := &demo{cmd: exec.Command(binary, args...), scratch: t.TempDir(), done: make(chan struct{})}
	d.cmd.Env = append(os.Environ(), "HOLDFAST_DEMO_MAIN=1", "TMPDIR="+d.scratch)
	d.cmd.Stderr = os.Stderr
	stdout, err := d.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := d.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	lines := bufio.NewScanner(stdout)
	timer := time.AfterFunc(30*time.Second, func() { _ = d.cmd.Process.Kill() })
	for d.url == "" && lines.Scan() {
		if m := backendLine.FindStringSubmatch(lines.Text()); m != nil {
			pid, _ := strconv.Atoi(m[2])
			d.backends, d.pids = append(d.backends, m[1]), append(d.pids, pid)
		} else if m := openLine.FindStringSubmatch(lines.Text()); m != nil {
			d.url = m[1]
		}
	}
	timer.Stop()
	go d.drain(stdout)
	t.Cleanup(func() {
		_ = d.cmd.Process.Kill()
		<-d.done
	})
	if d.url == "" || len(d.backends) != 2 {
		t.Fatalf("the demo has not started: got url %q, backends %q", d.url, d.backends)
	}
	return d
}

// drain owns the rest of stdout and reaps the process; its end ends it.
func (d *demo) drain(stdout io.Reader) {
	_, _ = io.Copy(io.Discard, stdout)
	d.err = d.cmd.Wait()
	close(d.done)
}

func (d *demo) awaitEnd(t *testing.T) {
	t.Helper()
	select {
	case <-d.done:
	case <-time.After(15 * time.Second):
		t.Fatal("the demo has not ended within 15 s")
	}
}

// interrupt does what Ctrl-C does, and checks that nothing remains.
func (d *demo) interrupt(t *testing.T) {
	t.Helper()
	if err := d.cmd.Process.Signal(os.Interrupt); err != nil {
		t.Fatal(err)
	}
	d.awaitEnd(t)
	if d.err != nil {
		t.Errorf("got %v, want exit code 0", d.err)
	}
	for _, pid := range d.pids {
		if err := syscall.Kill(pid, 0); !errors.Is(err, syscall.ESRCH) {
			t.Errorf("backend process %d is still there (%v)", pid, err)
		}
	}
	if left, err := os.ReadDir(d.scratch); err != nil || len(left) > 0 {
		t.Errorf("got files %v, error %v in the temporary directory; want none", left, err)
	}
}

// awaitNoBackend polls until no backend listens any more. A killed demo's
// backends end on their own, so there is no process to wait for.
func (d *demo) awaitNoBackend(t *testing.T) {
	t.Helper()
	deadline := time.Now().Add(10 * time.Second)
	for _, addr := range d.backends {
		for {
			conn, err := net.DialTimeout("tcp", addr, time.Second)
			if err != nil {
				break
			}
			conn.Close()
			if time.Now().After(deadline) {
				t.Fatalf("the backend on %s has outlived the demo", addr)
			}
			time.Sleep(20 * time.Millisecond)
		}
	}
}
