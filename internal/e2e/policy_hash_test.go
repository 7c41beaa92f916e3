// This file shows of the policies that hash something of the request, over 1000
// connections, that one value means one backend, before and after a loss.

package e2e

import (
	"fmt"
	"testing"
)

// Clients with the same value come to the same backend. When that is lost, they all
// go to the one that the policy chooses next, those who were there and those who come;
// nobody else moves. New ones go back when it is back.
func TestPolicyHashes(t *testing.T) {
	const values = 100
	posts := startPosts(t, 3)
	tests := []struct {
		name, policy string
		client       func(value, other int) visitor
	}{
		{"ip_hash", "ip_hash", func(value, other int) visitor {
			return visitor{
				from: fmt.Sprintf("127.0.1.%d", 1+value), target: fmt.Sprintf("/ip_hash?key=%d", other),
				header: fmt.Sprintf("X-Forwarded-For: 203.0.113.%d\r\n", other),
			}
		}},
		{"client_ip_hash", "client_ip_hash", func(value, other int) visitor {
			return visitor{
				from: fmt.Sprintf("127.0.2.%d", 1+other), target: fmt.Sprintf("/client_ip_hash?key=%d", other),
				header: fmt.Sprintf("X-Forwarded-For: 203.0.113.%d\r\n", value),
			}
		}},
		{"uri_hash", "uri_hash", func(value, other int) visitor {
			return visitor{target: fmt.Sprintf("/uri_hash/%d?key=%d", value/10, value), header: fmt.Sprintf("X-Key: %d\r\n", other)}
		}},
		{"query", "query key", func(value, other int) visitor {
			return visitor{target: fmt.Sprintf("/query/%d?other=%d&key=%d", other, other, value), header: fmt.Sprintf("X-Key: %d\r\n", other)}
		}},
		{"header", "header X-Key", func(value, other int) visitor {
			return visitor{target: fmt.Sprintf("/header/%d?key=%d", other, other), header: fmt.Sprintf("X-Key: %d\r\n", value)}
		}},
	}
	policies := make(map[string]string)
	for _, test := range tests {
		policies[test.name] = test.policy
	}
	p := startCaddy(t, "servers {\n trusted_proxies static 127.0.2.0/24\n }", policySites(posts, policies))
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			clients := func(i int) visitor {
				v := test.client(i%values, i/values)
				v.value = i % values
				return v
			}
			all := p.visit(t, crowdSize, clients)
			home := all.homes(t)
			for i, n := range all.by(posts) {
				if n < crowdSize/10 {
					t.Errorf("connections of upstream %d: got %d, want about a third", i+1, n)
				}
			}

			posts[1].leave()
			all.ask(t)
			next := all.homes(t)
			for value, backend := range home {
				if was, is := backend, next[value]; was != posts[1].addr && is != was {
					t.Errorf("value %d: got %s when another one than its %s was lost", value, is, was)
				} else if is == posts[1].addr {
					t.Errorf("value %d: got a backend that is gone", value)
				}
			}
			for i, n := range all.by(posts) {
				if i != 1 && n < crowdSize/5 {
					t.Errorf("connections of upstream %d: got %d, want about a half", i+1, n)
				}
			}
			p.visit(t, values, clients).want(t, next)

			posts[1].come(t)
			p.visit(t, values, clients).want(t, home)
			all.ask(t)
			all.want(t, next)
		})
	}
}

// homes returns the backend of each value. It is that of all who have it.
func (all visitors) homes(t testing.TB) map[int]string {
	t.Helper()
	home := make(map[int]string)
	for _, v := range all {
		if home[v.value] == "" {
			home[v.value] = v.backend
		}
	}
	all.want(t, home)
	return home
}

// want checks that each has the backend of its value.
func (all visitors) want(t testing.TB, home map[int]string) {
	t.Helper()
	wrong := 0
	for _, v := range all {
		if v.backend != home[v.value] {
			wrong++
		}
	}
	if wrong > 0 {
		t.Errorf("%d of %d clients have another backend than their values'", wrong, len(all))
	}
}
