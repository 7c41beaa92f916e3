// This file tests that the in-memory connection behaves like TCP.

package session

import (
	"io"
	"net"
	"os"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/holdfast-proxy/caddy-holdfast/internal/sock"
)

func TestMemConnKeepsTheContractOfConn(t *testing.T) {
	rules := map[string]func(t *testing.T, a, b *memConn){
		"a deadline in the past wakes a Read and loses nothing": func(t *testing.T, a, b *memConn) {
			errs := make(chan error)
			go func() {
				_, err := b.Read(make([]byte, 8))
				errs <- err
			}()
			synctest.Wait()
			_ = b.SetReadDeadline(past)
			if err := <-errs; err != os.ErrDeadlineExceeded {
				t.Fatalf("got %v, want the deadline", err)
			}
			write(t, a, "kept")
			if _, err := b.Read(make([]byte, 8)); err != os.ErrDeadlineExceeded {
				t.Errorf("got %v before the deadline was lifted, want the deadline", err)
			}
			_ = b.SetReadDeadline(time.Time{})
			wantRead(t, b, "kept", nil)
		},
		"a Write blocks when the buffer is full, up to its deadline": func(t *testing.T, a, b *memConn) {
			began := time.Now()
			_ = a.SetWriteDeadline(began.Add(3 * time.Second))
			n, err := a.Write(make([]byte, 20))
			if n != 16 || err != os.ErrDeadlineExceeded || time.Since(began) != 3*time.Second {
				t.Errorf("got %d bytes, %v after %v, want 16, the deadline, after 3s", n, err, time.Since(began))
			}
		},
		"a FIN comes after the data, and the other direction goes on": func(t *testing.T, a, b *memConn) {
			write(t, a, "last")
			_ = a.CloseWrite()
			wantRead(t, b, "last", nil)
			wantRead(t, b, "", io.EOF)
			write(t, b, "answer")
			wantRead(t, a, "answer", nil)
		},
		"a reset breaks both ends and loses the data": func(t *testing.T, a, b *memConn) {
			write(t, a, "lost")
			a.Reset()
			wantRead(t, b, "", syscall.ECONNRESET)
			if _, err := b.Write([]byte("x")); err != syscall.ECONNRESET {
				t.Errorf("got %v, want a reset", err)
			}
		},
		"Close wakes who waits": func(t *testing.T, a, b *memConn) {
			errs := make(chan error, 2)
			go func() {
				_, err := a.Read(make([]byte, 1))
				errs <- err
			}()
			go func() {
				_, err := a.Write(make([]byte, 17))
				errs <- err
			}()
			synctest.Wait()
			_ = a.Close()
			for range 2 {
				if err := <-errs; err != net.ErrClosed {
					t.Errorf("got %v, want closed", err)
				}
			}
			write(t, b, "answered with a reset")
			if _, err := b.Write([]byte("x")); err != syscall.EPIPE {
				t.Errorf("got %v, want a broken pipe", err)
			}
		},
		"who closes and leaves something unread resets": func(t *testing.T, a, b *memConn) {
			write(t, b, "unread")
			write(t, a, "before")
			_ = a.Close()
			if _, err := b.Write([]byte("x")); err != syscall.EPIPE {
				t.Errorf("got %v, want a broken pipe", err)
			}
			wantRead(t, b, "before", nil)
			wantRead(t, b, "", syscall.ECONNRESET)
		},
		"what is known of it is known": func(t *testing.T, a, b *memConn) {
			wantInfo(t, a, sock.Info{})
			write(t, a, "twelve bytes")
			wantInfo(t, a, sock.Info{Acked: 12})
			wantInfo(t, b, sock.Info{Unread: 12})
			go func() { _, _ = a.Write(make([]byte, 20)) }()
			synctest.Wait()
			wantInfo(t, a, sock.Info{Acked: 16, Unacked: 16, Unsent: 16})
			for range 2 {
				_, _ = b.Read(make([]byte, 16))
				synctest.Wait()
			}
			wantInfo(t, a, sock.Info{Acked: 32})
			_ = b.CloseWrite()
			wantInfo(t, a, sock.Info{Acked: 32, Finished: true})
		},
		"a reset is known": func(t *testing.T, a, b *memConn) {
			b.Reset()
			wantInfo(t, a, sock.Info{Finished: true, Reset: true})
		},
		"an end that refuses what comes is a reset when something comes": func(t *testing.T, a, b *memConn) {
			_ = b.Close()
			wantInfo(t, a, sock.Info{Finished: true})
			write(t, a, "late")
			wantInfo(t, a, sock.Info{Finished: true, Reset: true})
			wantRead(t, a, "", io.EOF)
		},
	}
	for rule, check := range rules {
		t.Run(rule, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				a, b := newMemPipe(16)
				check(t, a, b)
			})
		})
	}
}

func write(t *testing.T, c *memConn, text string) {
	t.Helper()
	if _, err := c.Write([]byte(text)); err != nil {
		t.Fatalf("got %v, want %q written", err, text)
	}
}

func wantRead(t *testing.T, c *memConn, want string, wantErr error) {
	t.Helper()
	buf := make([]byte, 64)
	n, err := c.Read(buf)
	if got := string(buf[:n]); got != want || err != wantErr {
		t.Errorf("got %q, %v, want %q, %v", got, err, want, wantErr)
	}
}

func wantInfo(t *testing.T, c *memConn, want sock.Info) {
	t.Helper()
	if got, ok := sock.Ask(c); got != want || !ok {
		t.Errorf("got %+v, known %v, want %+v", got, ok, want)
	}
}
