// This file has tests run in a network of their own, where packets can be lost.

package e2e

import (
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// Both ends of the cable.
const (
	nearIP, nearMAC = "192.0.2.1", "02:00:00:00:00:01"
	farIP, farMAC   = "192.0.2.2", "02:00:00:00:00:02"
)

// insideNamespace is the name of the test for which this process has a network of its own.
var insideNamespace = os.Getenv("HOLDFAST_NAMESPACE")

// inNamespace runs a test in a process of its own, which has a network of its own: a
// loopback, and a cable to a host that is far away.
func inNamespace(t *testing.T, test func(t *testing.T, far *farHost)) {
	if insideNamespace == t.Name() {
		test(t, newFarHost(t))
		return
	}
	const limit = 4 * time.Minute
	ctx, cancel := context.WithTimeout(t.Context(), limit+10*time.Second)
	defer cancel()
	args := append(newNamespace(t), "env", "HOLDFAST_NAMESPACE="+t.Name(),
		"sh", "-c", `ip link set lo up && exec "$0" "$@"`, os.Args[0],
		"-test.v", "-test.count=1", "-test.run=^"+t.Name()+"$", "-test.timeout="+limit.String())
	out, err := exec.CommandContext(ctx, args[0], args[1:]...).CombinedOutput()
	if err != nil || !strings.Contains(string(out), "--- PASS: "+t.Name()) {
		t.Errorf("in a network of its own: %v\n%s", err, out)
		return
	}
	t.Logf("%s", out)
}

// newNamespace returns a command that runs another one in a network of its own: as root,
// as a user who may become root of that only, or who may use sudo.
func newNamespace(t testing.TB) []string {
	t.Helper()
	var said []string
	for _, prefix := range []string{"unshare --net", "unshare --map-root-user --net", "sudo -n -E unshare --net"} {
		args := strings.Fields(prefix)
		out, err := exec.Command(args[0], append(args[1:], "ip", "link", "set", "lo", "up")...).CombinedOutput()
		if err == nil {
			return args
		}
		said = append(said, fmt.Sprintf("%s: %v: %s", prefix, err, out))
	}
	t.Fatalf("no network namespace can be made, which needs root, or the right to have user namespaces:\n%s", strings.Join(said, "\n"))
	return nil
}

// farHost is a host at the other end of a cable: a thread with a network of its own.
// Sockets that are made there stay there.
type farHost struct{ calls chan func() }

func newFarHost(t testing.TB) *farHost {
	t.Helper()
	h := &farHost{calls: make(chan func())}
	go h.run()
	t.Cleanup(func() { close(h.calls) })
	var thread int
	var err error
	h.do(func() { thread, err = unix.Gettid(), unix.Unshare(unix.CLONE_NEWNET) })
	if err != nil {
		t.Fatalf("making a network: %v", err)
	}
	ip(t, fmt.Sprintf("link add near address %s type veth peer name far address %s netns %d", nearMAC, farMAC, thread))
	h.ip(t, "address add "+farIP+"/24 dev far")
	h.ip(t, "link set far up")
	ip(t, "address add "+nearIP+"/24 dev near")
	ip(t, "link set near up")
	// Silence is no answer to ARP either, and would be told as an unreachable host.
	ip(t, "neighbor replace "+farIP+" lladdr "+farMAC+" dev near nud permanent")
	// What is local is looked up later, so that there is room for a rule before it.
	h.ip(t, "rule add pref 20 lookup local")
	h.ip(t, "rule delete pref 0")
	return h
}

// run owns the thread, which ends with it.
func (h *farHost) run() {
	runtime.LockOSThread()
	for call := range h.calls {
		call()
	}
}

// do calls f there.
func (h *farHost) do(f func()) {
	done := make(chan struct{})
	h.calls <- func() { defer close(done); f() }
	<-done
}

func (h *farHost) ip(t testing.TB, args string) {
	t.Helper()
	var out []byte
	var err error
	h.do(func() { out, err = exec.Command("ip", strings.Fields(args)...).CombinedOutput() })
	if err != nil {
		t.Fatalf("there: ip %s: %v: %s", args, err, out)
	}
}

func ip(t testing.TB, args string) {
	t.Helper()
	if out, err := exec.Command("ip", strings.Fields(args)...).CombinedOutput(); err != nil {
		t.Fatalf("ip %s: %v: %s", args, err, out)
	}
}

// silence has all packets that arrive there vanish.
func (h *farHost) silence(t testing.TB) {
	t.Helper()
	h.ip(t, "rule add pref 10 iif far blackhole")
}

// heal ends the silence.
func (h *farHost) heal(t testing.TB) {
	t.Helper()
	h.ip(t, "rule delete pref 10")
}

// refuse has packets that arrive there vanish likewise, but not without saying so: by
// ICMP, as a router does that knows no way on.
func (h *farHost) refuse(t testing.TB) {
	t.Helper()
	h.do(func() {
		// Only routers answer so. The thread's own network is meant.
		if err := os.WriteFile("/proc/sys/net/ipv4/conf/far/forwarding", []byte("1"), 0); err != nil {
			t.Error(err)
		}
	})
	h.ip(t, "rule add pref 10 iif far unreachable")
}

// echoes starts a backend there that echoes. It finds out by itself which of its clients
// are gone: what they said to the end was lost.
func (h *farHost) echoes(t testing.TB) (addr string) {
	t.Helper()
	var ln net.Listener
	var err error
	h.do(func() { ln, err = net.Listen("tcp", farIP+":0") })
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	t.Cleanup(func() { ln.Close(); <-done })
	go acceptTCP(ln, func(conn net.Conn) {
		_ = conn.(*net.TCPConn).SetKeepAliveConfig(net.KeepAliveConfig{Enable: true, Idle: time.Second, Interval: time.Second, Count: 60})
		echo(conn)
	}, done)
	return ln.Addr().String()
}

// dial connects a client from there.
func (h *farHost) dial(t testing.TB, addr string) (conn *net.TCPConn) {
	t.Helper()
	h.do(func() {
		c, err := net.DialTimeout("tcp", addr, 10*time.Second)
		if err != nil {
			t.Error(err)
			return
		}
		conn = c.(*net.TCPConn)
	})
	if conn == nil {
		t.FailNow()
	}
	t.Cleanup(func() { conn.Close() })
	_ = conn.SetDeadline(time.Now().Add(60 * time.Second))
	return conn
}
