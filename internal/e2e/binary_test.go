// This file runs Caddy as a process of its own.

package e2e

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// binary builds cmd/caddy once, without the race detector, and returns its path.
var binary = sync.OnceValues(func() (string, error) {
	dir, err := os.MkdirTemp("", "holdfast-e2e")
	if err != nil {
		return "", err
	}
	path := filepath.Join(dir, "caddy")
	out, err := exec.Command("go", "build", "-o", path, "../../cmd/caddy").CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("building cmd/caddy: %w: %s", err, out)
	}
	builtBinary.Store(&path)
	return path, nil
})

// builtBinary is set once binary has built.
var builtBinary atomic.Pointer[string]

// process is a running Caddy of its own.
type process struct {
	proxy
	cmd    *exec.Cmd
	exited chan struct{} // closed by wait, when the process has ended
	log    *bytes.Buffer // valid after exited
}

// startBinary runs the built Caddy with a Caddyfile that gets the site's and the
// admin endpoint's address. It is killed when the test ends, if it still runs.
func startBinary(t testing.TB, globals, body string) *process {
	t.Helper()
	at := proxy{addr: freeAddr(t), admin: freeAddr(t)}
	return startBinaryAt(t, at, at.siteConfig(globals, body))
}

// startBinaryAt is startBinary with a Caddyfile of the test's own, for these addresses.
func startBinaryAt(t testing.TB, at proxy, caddyfile string) *process {
	t.Helper()
	path, err := binary()
	if err != nil {
		t.Fatal(err)
	}
	p := &process{proxy: at, exited: make(chan struct{}), log: new(bytes.Buffer)}
	file := filepath.Join(t.TempDir(), "Caddyfile")
	if err := os.WriteFile(file, []byte(caddyfile), 0o600); err != nil {
		t.Fatal(err)
	}
	p.cmd = exec.Command(path, "run", "--config", file, "--adapter", "caddyfile")
	p.cmd.Stderr = p.log
	if err := p.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	p.pid = p.cmd.Process.Pid
	go p.wait()
	t.Cleanup(func() {
		_ = p.cmd.Process.Kill()
		<-p.exited
		if t.Failed() {
			t.Logf("Caddy's log:\n%s", p.log)
		}
	})
	if !eventually(20*time.Second, func() bool { return reachable(p.addr) && p.loaded() }) {
		t.Fatal("Caddy does not come up")
	}
	return p
}

// loaded reports whether all apps of the first config have started: the admin endpoint
// is there before that, and does not show the config.
func (p *process) loaded() bool {
	req, err := http.NewRequest(http.MethodGet, "http://"+p.admin+"/config/", nil)
	if err != nil {
		return false
	}
	req.Close = true // as in request
	res, err := http.DefaultClient.Do(req)
	if err != nil {
		return false
	}
	defer res.Body.Close()
	body, err := io.ReadAll(res.Body)
	return err == nil && strings.TrimSpace(string(body)) != "null"
}

// wait owns waiting for the process; it ends with it.
func (p *process) wait() {
	defer close(p.exited)
	_ = p.cmd.Wait()
}

func reachable(addr string) bool {
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	conn, err := new(net.Dialer).DialContext(ctx, "tcp", addr)
	if err != nil {
		return false
	}
	conn.Close()
	return true
}
