// This file asks the kernel about real sockets in every state that matters.

package sock

import (
	"bytes"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"syscall"
	"testing"
	"time"
)

// tcpPair returns both ends of a connection.
func tcpPair(t *testing.T) (a, b *net.TCPConn) {
	t.Helper()
	near, far := pair(t, "tcp", "127.0.0.1:0")
	return near.(*net.TCPConn), far.(*net.TCPConn)
}

func unixPair(t *testing.T) (a, b *net.UnixConn) {
	t.Helper()
	near, far := pair(t, "unix", filepath.Join(t.TempDir(), "s"))
	return near.(*net.UnixConn), far.(*net.UnixConn)
}

func pair(t *testing.T, network, address string) (near, far net.Conn) {
	t.Helper()
	l, err := net.Listen(network, address)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if near, err = net.Dial(network, l.Addr().String()); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = near.Close() })
	if far, err = l.Accept(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = far.Close() })
	return near, far
}

// await asks about conn until what is known satisfies ok.
func await(t *testing.T, conn any, what string, ok func(Info) bool) Info {
	t.Helper()
	var info Info
	for until := time.Now().Add(5 * time.Second); time.Now().Before(until); time.Sleep(time.Millisecond) {
		var known bool
		if info, known = Ask(conn); !known {
			t.Fatal("got nothing known, want an answer")
		}
		if ok(info) {
			return info
		}
	}
	t.Fatalf("got %+v, want %s", info, what)
	return info
}

func write(t *testing.T, w io.Writer, n int) {
	t.Helper()
	if _, err := w.Write(make([]byte, n)); err != nil {
		t.Fatal(err)
	}
}

func TestAskIdle(t *testing.T) {
	a, _ := tcpPair(t)
	u, _ := unixPair(t)
	for _, conn := range []net.Conn{a, u} {
		info, known := Ask(conn)
		if !known || info.Reset || info.Finished || info.Unread != 0 || info.Unacked != 0 {
			t.Errorf("%s: got %+v, known %t, want all zero but Acked", conn.LocalAddr().Network(), info, known)
		}
	}
}

func TestAskUnread(t *testing.T) {
	a, b := tcpPair(t)
	u, v := unixPair(t)
	for _, test := range []struct{ near, far net.Conn }{{a, b}, {u, v}} {
		write(t, test.far, 1000)
		await(t, test.near, "1000 bytes unread", func(i Info) bool { return i.Unread == 1000 && !i.Finished && !i.Reset })
		if _, err := io.ReadFull(test.near, make([]byte, 400)); err != nil {
			t.Fatal(err)
		}
		await(t, test.near, "600 bytes unread", func(i Info) bool { return i.Unread == 600 })
	}
}

// A peer that finished is told from one that is gone, with or without data left.
func TestAskFinished(t *testing.T) {
	for _, test := range []struct {
		name   string
		unread int
		end    func(c *net.TCPConn) error
	}{
		{"half-closed", 0, (*net.TCPConn).CloseWrite},
		{"half-closed, data left", 1000, (*net.TCPConn).CloseWrite},
		{"closed", 0, (*net.TCPConn).Close},
		{"closed, data left", 1000, (*net.TCPConn).Close},
	} {
		t.Run(test.name, func(t *testing.T) {
			a, b := tcpPair(t)
			if test.unread > 0 {
				write(t, b, test.unread)
			}
			if err := test.end(b); err != nil {
				t.Fatal(err)
			}
			await(t, a, "finished, not reset, and the data", func(i Info) bool {
				return i.Finished && !i.Reset && i.Unread == test.unread
			})
			p, err := io.ReadAll(a)
			if len(p) != test.unread || err != nil {
				t.Errorf("got %d bytes, error %v, want the %d that were left", len(p), err, test.unread)
			}
			await(t, a, "finished and all read", func(i Info) bool { return i.Finished && !i.Reset && i.Unread == 0 })
		})
	}
}

// When both sides have finished in good order nothing is lost: that is no reset.
func TestAskFinishedByBoth(t *testing.T) {
	a, b := tcpPair(t)
	if err := a.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	await(t, b, "finished", func(i Info) bool { return i.Finished })
	write(t, b, 1000)
	if err := b.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	await(t, a, "1000 bytes unread", func(i Info) bool { return i.Unread == 1000 })
	info := await(t, a, "an end", func(i Info) bool { return i.Finished || i.Reset })
	if info.Reset || !info.Finished {
		t.Errorf("got %+v, want it finished and not reset", info)
	}
	if p, err := io.ReadAll(a); len(p) != 1000 || err != nil {
		t.Errorf("got %d bytes, error %v, want all 1000", len(p), err)
	}
}

func TestAskReset(t *testing.T) {
	for name, prepare := range map[string]func(t *testing.T, a, b *net.TCPConn){
		"idle":                    func(*testing.T, *net.TCPConn, *net.TCPConn) {},
		"after what was not read": func(t *testing.T, a, b *net.TCPConn) { write(t, a, 1000) },
		"after a FIN":             func(t *testing.T, a, b *net.TCPConn) { _ = b.CloseWrite() },
		"after our FIN":           func(t *testing.T, a, b *net.TCPConn) { _ = a.CloseWrite() },
	} {
		t.Run(name, func(t *testing.T) {
			a, b := tcpPair(t)
			prepare(t, a, b)
			if err := b.SetLinger(0); err != nil {
				t.Fatal(err)
			}
			if err := b.Close(); err != nil {
				t.Fatal(err)
			}
			await(t, a, "reset", func(i Info) bool { return i.Reset })
			_, err := a.Read(make([]byte, 1))
			if !errors.Is(err, syscall.ECONNRESET) && !errors.Is(err, io.EOF) {
				t.Errorf("got error %v from Read, want a reset", err)
			}
		})
	}
}

// What the peer's application does not read its kernel still takes, up to its
// buffer; what that does not take is not acknowledged, and soon not even sent. A
// reader makes Acked grow.
func TestAskUnackedAndAcked(t *testing.T) {
	a, b := tcpPair(t)
	write(t, a, 1000)
	before := await(t, a, "1000 bytes acknowledged", func(i Info) bool { return i.Unacked == 0 && i.Acked >= 1000 })

	written := make(chan int, 1)
	go func() { // ends at the deadline
		_ = a.SetWriteDeadline(time.Now().Add(200 * time.Millisecond))
		n, _ := a.Write(make([]byte, 64<<20))
		written <- n
	}()
	await(t, a, "bytes unacknowledged", func(i Info) bool { return i.Unacked > 0 })
	total := 1000 + <-written
	stalled := await(t, a, "bytes unsent", func(i Info) bool { return i.Unsent > 0 })
	if stalled.Unsent > stalled.Unacked {
		t.Errorf("got %+v, want that what is unsent is unacknowledged", stalled)
	}
	if got := int(stalled.Acked-before.Acked) + stalled.Unacked + 1000; got < total || got > total+1 {
		t.Errorf("got %d bytes acknowledged or not, want the %d written", got, total)
	}

	go func() { _, _ = io.Copy(io.Discard, b) }() // until b is closed
	after := await(t, a, "all acknowledged", func(i Info) bool { return i.Unacked == 0 })
	if after.Acked <= stalled.Acked || after.Reset || after.Finished {
		t.Errorf("got %+v after the peer has read, want more acknowledged than %d", after, stalled.Acked)
	}
}

func TestAskUnix(t *testing.T) {
	t.Run("closed with data left", func(t *testing.T) {
		a, b := unixPair(t)
		write(t, b, 1000)
		_ = b.Close()
		await(t, a, "finished with data left, not reset", func(i Info) bool { return i.Finished && !i.Reset && i.Unread == 1000 })
		if p, err := io.ReadAll(a); len(p) != 1000 || err != nil {
			t.Errorf("got %d bytes, error %v, want all", len(p), err)
		}
		await(t, a, "finished", func(i Info) bool { return i.Finished && i.Unread == 0 })
	})
	t.Run("half-closed", func(t *testing.T) {
		a, b := unixPair(t)
		write(t, b, 10)
		_ = b.CloseWrite()
		await(t, a, "finished, not reset", func(i Info) bool { return i.Finished && !i.Reset && i.Unread == 10 })
		if _, err := io.ReadFull(a, make([]byte, 10)); err != nil {
			t.Fatal(err)
		}
		await(t, a, "finished, not reset", func(i Info) bool { return i.Finished && !i.Reset && i.Unread == 0 })
		write(t, a, 5) // the other way is still open
	})
	t.Run("unacknowledged until read", func(t *testing.T) {
		a, b := unixPair(t)
		write(t, a, 1000)
		await(t, a, "unacknowledged", func(i Info) bool { return i.Unacked > 0 })
		if _, err := io.ReadFull(b, make([]byte, 1000)); err != nil {
			t.Fatal(err)
		}
		await(t, a, "all acknowledged", func(i Info) bool { return i.Unacked == 0 && i.Acked == 0 })
	})
}

func TestAskTakesNoBytes(t *testing.T) {
	a, b := tcpPair(t)
	if _, err := b.Write([]byte("hello")); err != nil {
		t.Fatal(err)
	}
	for range 100 {
		Ask(a)
	}
	_ = b.Close()
	if p, err := io.ReadAll(a); !bytes.Equal(p, []byte("hello")) || err != nil {
		t.Errorf("got %q, error %v, want hello", p, err)
	}
}

// Ask may come while another goroutine blocks in Read, and after Close.
func TestAskBesideReadAndAfterClose(t *testing.T) {
	a, b := tcpPair(t)
	read := make(chan error, 1)
	go func() { // ends with the write below
		_, err := a.Read(make([]byte, 1))
		read <- err
	}()
	for range 100 {
		if _, known := Ask(a); !known {
			t.Fatal("got nothing known beside a Read")
		}
	}
	write(t, b, 1)
	if err := <-read; err != nil {
		t.Fatal(err)
	}
	_ = a.Close()
	if info, known := Ask(a); known {
		t.Errorf("got %+v of a closed connection, want nothing known", info)
	}
}

// An established connection is nothing else; what is no connection is unknown.
func TestAskOthers(t *testing.T) {
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _, _ = r.Close(), w.Close() })
	near, far := net.Pipe()
	t.Cleanup(func() { _, _ = near.Close(), far.Close() })
	for name, conn := range map[string]any{"nil": nil, "in-memory pipe": near, "buffer": new(bytes.Buffer), "number": 1} {
		if info, known := Ask(conn); known {
			t.Errorf("%s: got %+v, want nothing known", name, info)
		}
	}
}
