// Package e2e tests Holdfast as a part of a real Caddy, over real sockets, with
// clients and backends that nobody here wrote.
//
// Most tests run Caddy in this process, so that the race detector sees both; see
// startCaddy. What concerns the process as a whole runs the binary; see startBinary.
package e2e

import (
	"bufio"
	"fmt"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig"
	_ "github.com/caddyserver/caddy/v2/modules/standard"

	_ "github.com/holdfast-proxy/caddy-holdfast"
)

// proxy is a running Caddy.
type proxy struct {
	addr  string // host:port of the site
	admin string // host:port of the admin endpoint
	pid   int    // of the process that it is; 0: this one
}

// freeAddr returns a loopback address that nobody listens on, that it has not returned
// before, and that the kernel gives to nobody by itself: its port is below those from
// which it picks. It is free on all other addresses too, on which Caddy listens.
func freeAddr(t testing.TB) string {
	t.Helper()
	for range 1000 {
		port := 20000 + rand.IntN(12000)
		ln, err := net.Listen("tcp", fmt.Sprint(":", port))
		if err != nil {
			continue
		}
		ln.Close()
		if _, again := givenPorts.LoadOrStore(port, true); !again {
			return fmt.Sprint("127.0.0.1:", port)
		}
	}
	t.Fatal("no port is free")
	return ""
}

// givenPorts are those that freeAddr has returned.
var givenPorts sync.Map

// siteConfig is a Caddyfile with one plain site that has the given body, and
// optional global options.
func (p *proxy) siteConfig(globals, body string) string {
	return fmt.Sprintf(`{
	admin %s
	grace_period 2s
	persist_config off
	storage file_system %s
	log {
		level ERROR
	}
	%s
}
http://%s {
	%s
}
`, p.admin, storage, globals, p.addr, body)
}

// startCaddy runs Caddy in this process with one plain site. When the test ends
// Caddy is stopped, and nothing of any connection may be left.
func startCaddy(t testing.TB, globals, body string) *proxy {
	t.Helper()
	p := &proxy{addr: freeAddr(t), admin: freeAddr(t)}
	before := openDescriptors(t)
	t.Cleanup(func() {
		p.waitEmpty(t)
		if err := caddy.Stop(); err != nil {
			t.Errorf("stopping Caddy: %v", err)
		}
		checkLeaks(t, before)
	})
	p.load(t, p.siteConfig(globals, body))
	return p
}

// load makes a Caddyfile the running config.
func (p *proxy) load(t testing.TB, caddyfile string) {
	t.Helper()
	cfg, _, err := caddyconfig.GetAdapter("caddyfile").Adapt([]byte(caddyfile), nil)
	if err != nil {
		t.Fatalf("adapting: %v\n%s", err, caddyfile)
	}
	if err := caddy.Load(cfg, true); err != nil {
		t.Fatalf("loading: %v\n%s", err, caddyfile)
	}
	p.waitListeners(t)
}

// reload loads a Caddyfile through the admin API.
func (p *proxy) reload(t testing.TB, caddyfile string) {
	t.Helper()
	if status, said := p.submit(t, "text/caddyfile", []byte(caddyfile)); status != http.StatusOK {
		t.Fatalf("reload: %d: %s", status, said)
	}
}

// submit is reload, of a config that may be refused. Every load restarts the admin
// endpoint, also one that fails, which may cost the next request its connection.
func (p *proxy) submit(t testing.TB, contentType string, config []byte) (status int, said string) {
	t.Helper()
	var err error
	if !eventually(20*time.Second, func() bool {
		var answer []byte
		status, answer, err = p.post("/load", contentType, config)
		said = string(answer)
		return err == nil
	}) {
		t.Fatal(err)
	}
	p.waitListeners(t)
	return status, said
}

// waitListeners waits until nothing listens any more for the config that was replaced:
// that resets who has come to it and was not accepted.
func (p *proxy) waitListeners(t testing.TB) {
	t.Helper()
	var twice []string
	if !eventually(20*time.Second, func() bool {
		twice = nil
		for addr, n := range p.listening(t) {
			if n > 1 {
				twice = append(twice, addr)
			}
		}
		return len(twice) == 0
	}) {
		t.Errorf("the config that was replaced still listens, at %q", twice)
	}
}

// listening is how many sockets of Caddy's process listen, by their address as the
// kernel writes it.
func (p *proxy) listening(t testing.TB) map[string]int {
	t.Helper()
	proc := "/proc/self"
	if p.pid != 0 {
		proc = fmt.Sprint("/proc/", p.pid)
	}
	own := make(map[string]bool) // inodes
	files, err := os.ReadDir(proc + "/fd")
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range files {
		to, _ := os.Readlink(proc + "/fd/" + f.Name()) // fails for what is closed by now
		if inode, ok := strings.CutPrefix(to, "socket:["); ok {
			own[strings.TrimSuffix(inode, "]")] = true
		}
	}
	all := make(map[string]int)
	for _, table := range []string{"/net/tcp", "/net/tcp6"} {
		file, err := os.Open(proc + table)
		if err != nil {
			t.Fatal(err)
		}
		defer file.Close()
		lines := bufio.NewScanner(file)
		lines.Scan() // the names of the columns
		for lines.Scan() {
			const addr, state, inode = 1, 3, 9
			f := strings.Fields(lines.Text())
			if f[state] != "0A" {
				break // those that listen come first
			}
			if own[f[inode]] {
				all[f[addr]]++
			}
		}
	}
	return all
}

// eventually polls until cond holds, and reports whether it did within limit.
func eventually(limit time.Duration, cond func() bool) bool {
	deadline := time.Now().Add(limit)
	for !cond() {
		if time.Now().After(deadline) {
			return false
		}
		time.Sleep(10 * time.Millisecond)
	}
	return true
}

// storage is the directory that Caddy may write to; it goes with the test process.
var storage string

// TestMain gives Caddy a home of its own, runs it once so that what it keeps
// open, like the admin endpoint's socket, counts as no leak, and removes what
// the tests made.
func TestMain(m *testing.M) {
	home, err := os.MkdirTemp("", "holdfast-home")
	if err != nil {
		panic(err)
	}
	storage = home
	if err := caddy.Load([]byte(`{"admin":{"listen":"127.0.0.1:0","config":{"persist":false}},"storage":{"module":"file_system","root":"`+home+`"},"logging":{"logs":{"default":{"level":"ERROR"}}},"apps":{"http":{"servers":{"s":{"listen":["127.0.0.1:0"]}}}}}`), true); err != nil {
		panic(err)
	}
	if err := caddy.Stop(); err != nil {
		panic(err)
	}
	code := m.Run()
	if path := builtBinary.Load(); path != nil {
		os.RemoveAll(filepath.Dir(*path))
	}
	os.RemoveAll(home)
	os.Exit(code)
}
