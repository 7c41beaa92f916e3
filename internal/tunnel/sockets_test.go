// This file holds what tests over real sockets share.

package tunnel

import (
	"io"
	"net"
	"path/filepath"
	"testing"
	"time"
)

// testTimeout bounds whatever a test over sockets waits for.
const testTimeout = 20 * time.Second

// soon is a second as a busy machine counts it, and less than registry.ClosingTimeout.
const soon = 4 * time.Second

// tcpPair returns both ends of a connection over loopback.
func tcpPair(t testing.TB) (near, far *net.TCPConn) {
	t.Helper()
	a, b := socketPair(t, "tcp", "127.0.0.1:0")
	return a.(*net.TCPConn), b.(*net.TCPConn)
}

func unixPair(t testing.TB) (near, far *net.UnixConn) {
	t.Helper()
	a, b := socketPair(t, "unix", filepath.Join(t.TempDir(), "s"))
	return a.(*net.UnixConn), b.(*net.UnixConn)
}

func socketPair(t testing.TB, network, address string) (near, far net.Conn) {
	t.Helper()
	l, err := net.Listen(network, address)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if far, err = net.Dial(network, l.Addr().String()); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = far.Close() })
	if near, err = l.Accept(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = near.Close() })
	_ = far.SetDeadline(time.Now().Add(testTimeout))
	return near, far
}

// tcpRig is a tunnel between two TCP connections, of which the test has the far ends.
func tcpRig(t testing.TB, set Settings, early string) (r *rig, client, backend *net.TCPConn) {
	t.Helper()
	nearClient, client := tcpPair(t)
	nearBackend, backend := tcpPair(t)
	return start(t, set, nearClient, nearBackend, early), client, backend
}

func send(t testing.TB, w io.Writer, text string) {
	t.Helper()
	if _, err := io.WriteString(w, text); err != nil {
		t.Fatal(err)
	}
}

func wantText(t testing.TB, r io.Reader, want string) {
	t.Helper()
	b := make([]byte, len(want))
	if n, err := io.ReadFull(r, b); err != nil || string(b) != want {
		t.Fatalf("got %q, %v, want %q", b[:n], err, want)
	}
}

// wantEOF checks that nothing more comes but the end.
func wantEOF(t testing.TB, r io.Reader) {
	t.Helper()
	if b, err := io.ReadAll(r); err != nil || len(b) > 0 {
		t.Errorf("got %d bytes, %v, want the end", len(b), err)
	}
}
