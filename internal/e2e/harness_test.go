// Package e2e tests Holdfast as a part of a real Caddy, over real sockets, with
// clients and backends that nobody here wrote.
//
// Most tests run Caddy in this process, so that the race detector sees both; see
// startCaddy. What concerns the process as a whole runs the binary; see startBinary.
package e2e

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/mholt/caddy-l4/layer4"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	_ "github.com/caddyserver/caddy/v2/modules/standard"

	_ "github.com/holdfast-proxy/caddy-holdfast"
)

// proxy is a running Caddy.
type proxy struct {
	addr  string // host:port of the site
	admin string // host:port of the admin endpoint
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
	load := func() (*http.Response, error) {
		req, err := http.NewRequest(http.MethodPost, "http://"+p.admin+"/load", strings.NewReader(caddyfile))
		if err != nil {
			t.Fatal(err)
		}
		req.Header.Set("Content-Type", "text/caddyfile")
		req.Close = true // a reload restarts the admin endpoint, which may reset a connection that idles
		return http.DefaultClient.Do(req)
	}
	res, err := load()
	if err != nil {
		res, err = load() // the one before has reset it, see request
	}
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	if res.StatusCode != http.StatusOK {
		msg, _ := io.ReadAll(res.Body)
		t.Fatalf("reload: %s: %s", res.Status, msg)
	}
	p.waitListeners(t)
}

// waitListeners waits until the config that was replaced listens no more, if Caddy runs
// in this process: that one resets who has come to it and was not accepted.
func (p *proxy) waitListeners(t testing.TB) {
	t.Helper()
	listen := []string{p.admin}
	if app, err := caddy.ActiveContext().AppIfConfigured("http"); err == nil {
		for _, s := range app.(*caddyhttp.App).Servers {
			listen = append(listen, s.Listen...)
		}
	}
	if app, err := caddy.ActiveContext().AppIfConfigured("layer4"); err == nil {
		for _, s := range app.(*layer4.App).Servers {
			listen = append(listen, s.Listen...)
		}
	}
	for _, address := range listen {
		a, err := caddy.ParseNetworkAddress(address)
		if err != nil {
			t.Fatal(err)
		}
		if !eventually(20*time.Second, func() bool { return caddy.ListenerUsage(a.Network, a.JoinHostPort(0)) <= 1 }) {
			t.Errorf("%s: the config that was replaced still listens", address)
		}
	}
}

// request sends a request to the admin API and returns the status and the body.
func (p *proxy) request(t testing.TB, method, path string) (int, []byte) {
	t.Helper()
	req, err := http.NewRequest(method, "http://"+p.admin+path, nil)
	if err != nil {
		t.Fatal(err)
	}
	req.Close = true // no idle connection that would count as a leak
	res, err := http.DefaultClient.Do(req)
	if err != nil && method == http.MethodGet {
		// A reload resets connections that the listener it replaces has not accepted.
		res, err = http.DefaultClient.Do(req)
	}
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	body, err := io.ReadAll(res.Body)
	if err != nil {
		t.Fatal(err)
	}
	return res.StatusCode, body
}

// call is request, and decodes what comes back into out unless that is nil.
func (p *proxy) call(t testing.TB, method, path string, out any) int {
	t.Helper()
	status, body := p.request(t, method, path)
	if out != nil {
		if err := json.Unmarshal(body, out); err != nil {
			t.Fatalf("%s %s: %v: %s", method, path, err, body)
		}
	}
	return status
}

// connection is a connection as the admin API shows it.
type connection struct {
	ID, Kind, Route, State, Reason, Client, Upstream, Dial, Host, URI, Protocol, Subprotocol string
	Age, Idle                                                                                float64
	BytesIn                                                                                  uint64 `json:"bytes_in"`
	BytesOut                                                                                 uint64 `json:"bytes_out"`
	MessagesIn                                                                               uint64 `json:"messages_in"`
	MessagesOut                                                                              uint64 `json:"messages_out"`
}

// stats are the registry's totals.
type stats struct {
	Total          int
	ByState        map[string]int `json:"by_state"`
	ByUpstream     map[string]int `json:"by_upstream"`
	ByRoute        map[string]int `json:"by_route"`
	ClosedByReason map[string]int `json:"closed_by_reason"`
}

func (p *proxy) connections(t testing.TB) []connection {
	t.Helper()
	var list struct{ Connections []connection }
	p.call(t, http.MethodGet, "/connections?limit=1000", &list)
	return list.Connections
}

func (p *proxy) stats(t testing.TB) stats {
	t.Helper()
	var s stats
	p.call(t, http.MethodGet, "/connections/stats", &s)
	return s
}

// waitEmpty waits until the registry is empty.
func (p *proxy) waitEmpty(t testing.TB) {
	t.Helper()
	var s stats
	if !eventually(10*time.Second, func() bool { s = p.stats(t); return s.Total == 0 }) {
		t.Errorf("connections left in the registry: %+v: %+v", s, p.connections(t))
	}
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

// openDescriptors is what descriptors this process has open, but for those of
// the runtime's poller.
func openDescriptors(t testing.TB) []string {
	t.Helper()
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	var open []string
	for _, e := range entries {
		if to, err := os.Readlink("/proc/self/fd/" + e.Name()); err == nil && !strings.HasPrefix(to, "anon_inode:[event") {
			open = append(open, e.Name()+" "+to)
		}
	}
	return open
}

// checkLeaks fails the test if a goroutine of a connection or an upstream, or more descriptors
// than before, are left.
func checkLeaks(t testing.TB, before []string) {
	t.Helper()
	http.DefaultClient.CloseIdleConnections()
	var stacks string
	if !eventually(10*time.Second, func() bool { stacks = ownGoroutines(); return stacks == "" }) {
		t.Errorf("goroutines left:\n%s", stacks)
	}
	var after []string
	if !eventually(10*time.Second, func() bool { after = openDescriptors(t); return len(after) <= len(before) }) {
		t.Errorf("open descriptors: got %q, want no more than before: %q", after, before)
	}
}

// ownGoroutines returns the stacks of the goroutines that run connections, and of those
// that watch upstreams.
func ownGoroutines() string {
	buf := make([]byte, 4<<20)
	buf = buf[:runtime.Stack(buf, true)]
	var own []string
	for g := range strings.SplitSeq(string(buf), "\n\n") {
		for _, pkg := range []string{"session", "tunnel", "opening", "registry", "pool", "health"} {
			if strings.Contains(g, "caddy-holdfast/internal/"+pkg+".") {
				own = append(own, g)
				break
			}
		}
	}
	return strings.Join(own, "\n\n")
}

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

// storage is the directory that Caddy may write to; it goes with the test process.
var storage string

// builtBinary is set once binary has built.
var builtBinary atomic.Pointer[string]

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
