# All ring-0 code of the guest: start-up, and the handlers of interrupts and exceptions.
#
# Integer instructions only, and few: the machine's own KVM emulates ring 0 at 0.8 us an instruction and gives up at SSE
# and a dozen others (tests/ring0.rs holds the list and decodes what is here). All other code runs in ring 3.
#
# Names used from Rust: guest_main, report_panic (called by iretq), starting_cpu, kvm_clock, and the symbols marked globl.

    .set CODE32, 0x08
    .set CODE64, 0x10
    .set DATA, 0x18
    .set USER_DATA, 0x20 | 3
    .set USER_CODE, 0x28 | 3

    .set CPUS, 32
    .set TASK_STATE_SHIFT, 9
    .set RING0_STACK_SHIFT, 9
    .set USER_STACK_SHIFT, 14

    .set PRESENT_WRITABLE_USER, 0x7
    .set LARGE_PAGE, 0x80
    .set UNCACHED, 0x18

    # Where the local APIC is seen: the last 2 MiB of the first GiB of virtual addresses, so that handlers reach it by a
    # 32-bit displacement.
    .set LAPIC, 0x3fe00000
    .set LAPIC_PHYSICAL, 0xfee00000
    .set LAPIC_EOI, 0xb0
    .set VIRTIO_WINDOWS, 0xd0000000
    .set IO_APIC_PAGE, 0xfec00000
    .set LAPIC_TIMER_COUNT, 0x380

# ---- PVH entry point (xen/include/public/elfnote.h: XEN_ELFNOTE_PHYS32_ENTRY)

    .section .note.pvh, "a", @note
    .balign 4
    .long 4, 8, 18
    .asciz "Xen"
    .quad pvh_entry

# ---- Application processors start here in real mode, in a copy of this code below 1 MiB

    .section .ring0.code16, "ax", @progbits
    .code16
    .globl ap_trampoline, ap_trampoline_end
ap_trampoline:
    cli
    movw %cs, %ax
    movw %ax, %ds
    # start_ap() puts a copy of gdt_pointer right behind this code.
    lgdtl ap_trampoline_end - ap_trampoline
    movl $0x11, %eax                # protected mode, without paging
    movl %eax, %cr0
    ljmpl $CODE32, $ap_entry
ap_trampoline_end:

# ---- The boot processor starts here in 32-bit protected mode, without paging; ebx is the hvm_start_info

    .section .ring0.code32, "ax", @progbits
    .code32
    .globl pvh_entry
pvh_entry:
    cli
    cld
    movl %ebx, %esi                 # second argument of guest_main
    xorl %edi, %edi                 # first: the boot processor is vCPU 0
    jmp enter_long_mode

ap_entry:
    movw $DATA, %ax
    movw %ax, %ds
    movl starting_cpu, %edi
    xorl %esi, %esi

enter_long_mode:
    lgdtl gdt_pointer
    movw $DATA, %ax
    movw %ax, %ds
    movw %ax, %es
    movw %ax, %ss
    movl $0x620, %eax               # PAE; OSFXSR and OSXMMEXCPT for the SSE code of ring 3
    movl %eax, %cr4
    movl $pml4, %eax
    movl %eax, %cr3
    movl $0xc0000080, %ecx          # EFER
    rdmsr
    orl $0x100, %eax                # long mode
    wrmsr
    movl $0x80000033, %eax          # paging, NE, ET, MP, protected mode; caches on
    movl %eax, %cr0
    ljmpl $CODE64, $long_mode

    .section .ring0.code64, "ax", @progbits
    .code64
long_mode:
    # This vCPU's task state: its ring-0 stack, and an all-zero I/O bitmap, which opens all low ports to ring 3.
    movl %edi, %eax
    shll $TASK_STATE_SHIFT, %eax
    addl $task_states, %eax
    leal 1(%rdi), %edx
    shll $RING0_STACK_SHIFT, %edx
    addl $ring0_stacks, %edx
    movq %rdx, %rsp
    movq %rdx, 4(%rax)
    movw $104, 102(%rax)

    movl %edi, %ecx
    shll $4, %ecx
    addl $task_descriptors, %ecx
    movw $(1 << TASK_STATE_SHIFT) - 1, (%rcx)
    movw %ax, 2(%rcx)
    shrl $16, %eax
    movb %al, 4(%rcx)
    movb $0x89, 5(%rcx)
    movb %ah, 7(%rcx)
    subl $gdt, %ecx
    ltr %cx
    lidtq idt_pointer               # guest_main fills it in, before anything can use it

    # kvmclock, for the frequency of the TSC: only vCPU 0 needs it, and only if this is KVM and has it.
    testl %edi, %edi
    jnz enter_ring3
    movl $0x40000000, %eax
    cpuid
    cmpl $0x4b4d564b, %ebx          # "KVMK"
    jne enter_ring3
    cmpl $0x564b4d56, %ecx          # "VMKV"
    jne enter_ring3
    movl $0x40000001, %eax
    cpuid
    testl $8, %eax                  # KVM_FEATURE_CLOCKSOURCE2
    jz enter_ring3
    movl $0x4b564d01, %ecx          # MSR_KVM_SYSTEM_TIME_NEW
    movl $kvm_clock + 1, %eax
    xorl %edx, %edx
    wrmsr

enter_ring3:
    leal 1(%rdi), %eax
    shll $USER_STACK_SHIFT, %eax
    addl $user_stacks - 8, %eax     # as if a call had pushed its return address
    pushq $USER_DATA
    pushq %rax
    pushq $0x202                    # interrupts on
    pushq $USER_CODE
    pushq $guest_main
    iretq

# ---- Idle: ring 3 executes hlt at idle_hlt with the timer count in eax, which faults. At idle_unless_hlt it does so if no
# device has interrupted since it set device_events to 0: then there is work, and it goes on at once.

general_protection:
    cmpq $idle_hlt, 8(%rsp)
    je 5f
    cmpq $idle_unless_hlt, 8(%rsp)
    jne 1f
    cmpl $0, device_events          # no interrupt can come between this and the hlt but where it ends the hlt
    je 5f
    addq $8, %rsp                   # the error code
    incq (%rsp)                     # behind the hlt, which is one byte
    iretq
5:  movl %eax, LAPIC + LAPIC_TIMER_COUNT
0:  sti
    hlt
    jmp 0b

# Port I/O of ring 3 that faults: QEMU's emulation heeds the permission bitmap only of a task register that ltr has loaded,
# not of one that was restored (it asks for a descriptor that is not busy). Loading it again heals that, and does no harm
# elsewhere. What does not heal is reported once the reloads are used up.

1:  testb $3, 16(%rsp)
    jz 4f
    pushq %rax
    movq 16(%rsp), %rax             # rip
    movb (%rax), %al
    cmpb $0xf3, %al                 # rep outsb
    je 2f
    cmpb $0xee, %al                 # outb %al, %dx
    je 2f
    cmpb $0xec, %al                 # inb %dx, %al
    jne 3f
2:  lock decl task_reloads
    js 3f
    strw %ax
    movzwl %ax, %eax
    andb $0xfd, gdt + 5(%rax)       # not busy
    ltr %ax
    popq %rax
    addq $8, %rsp                   # the error code
    iretq
3:  popq %rax
4:  pushq $13
    jmp report_exception

# The timer. Where it interrupted ring 0, that is the loop above, be it before or in the hlt: go back to ring 3 from here,
# so that no interrupt shadow after sti is needed. In ring 3 it is late (state was restored, say) and means nothing.
    .globl timer_interrupt
timer_interrupt:
    movl $0, LAPIC + LAPIC_EOI
    testb $3, 8(%rsp)
    jz 0f
    iretq
0:  movq 24(%rsp), %rsp             # the stack as it was in the loop: an error code, then the frame of the fault
    addq $8, %rsp
    incq (%rsp)                     # behind the hlt, which is one byte
    iretq

# A device. It is noted, and ends an idle time as the timer does.
    .globl device_interrupt
device_interrupt:
    movl $1, device_events
    jmp timer_interrupt

    .globl spurious_interrupt
spurious_interrupt:
    iretq

# ---- Exceptions that must not happen: reported by ring 3, on a stack of its own

    .macro exception vector, has_error=0
    .balign 16
    .if \has_error == 0
    pushq $0
    .endif
    .if \vector == 13
    jmp general_protection
    .else
    pushq $\vector
    jmp report_exception
    .endif
    .endm

    .balign 16
    .globl exception_stubs
exception_stubs:                    # 16 bytes each
    .irp vector, 0, 1, 2, 3, 4, 5, 6, 7
    exception \vector
    .endr
    exception 8, 1
    exception 9
    .irp vector, 10, 11, 12, 13, 14
    exception \vector, 1
    .endr
    .irp vector, 15, 16
    exception \vector
    .endr
    exception 17, 1
    .irp vector, 18, 19, 20
    exception \vector
    .endr
    exception 21, 1
    .irp vector, 22, 23, 24, 25, 26, 27, 28
    exception \vector
    .endr
    .irp vector, 29, 30
    exception \vector, 1
    .endr
    exception 31
    .balign 16

report_exception:
    btsl $0, panicked
    jc 0f                           # the report itself failed
    popq %rdi                       # vector
    popq %rdx                       # error code
    movq (%rsp), %rsi               # rip
    movq %cr2, %rcx
    pushq $USER_DATA
    pushq $panic_stack_end - 8
    pushq $0x2
    pushq $USER_CODE
    pushq $report_panic
    iretq
0:  movw $0x501, %dx
    movb $0xff, %al
    outb %al, %dx
1:  cli
    hlt
    jmp 1b

# ---- Ring 3: gives the processor away until edi timer counts (nanoseconds) have passed

    .section .text.idle, "ax", @progbits
    .globl idle
idle:
    movl %edi, %eax
idle_hlt:
    hlt
    ret

# The same, but not at all if a device has interrupted since device_events was set to 0.
    .globl idle_unless_event
idle_unless_event:
    movl %edi, %eax
idle_unless_hlt:
    hlt
    ret

# ---- Tables

    .section .data
    .balign 4096
pml4:
    .quad first_gib + PRESENT_WRITABLE_USER
    .quad pool_directory_pointers + PRESENT_WRITABLE_USER
    .fill 510, 8, 0
first_gib:
    .quad first_gib_directory + PRESENT_WRITABLE_USER
    .quad 0, 0
    .quad device_directory + PRESENT_WRITABLE_USER
    .fill 508, 8, 0
first_gib_directory:
    .set address, 0
    .rept 511
    .quad address + LARGE_PAGE + PRESENT_WRITABLE_USER
    .set address, address + 0x200000
    .endr
    .quad LAPIC_PHYSICAL + LARGE_PAGE + UNCACHED + PRESENT_WRITABLE_USER

    # The GiB below 4 GiB, of which only devices are mapped, where they are: the virtio windows and the I/O APIC.
device_directory:
    .fill (VIRTIO_WINDOWS - 0xc0000000) >> 21, 8, 0
    .quad VIRTIO_WINDOWS + LARGE_PAGE + UNCACHED + PRESENT_WRITABLE_USER
    .fill ((IO_APIC_PAGE - VIRTIO_WINDOWS) >> 21) - 1, 8, 0
    .quad IO_APIC_PAGE + LARGE_PAGE + UNCACHED + PRESENT_WRITABLE_USER
    .fill 511 - ((IO_APIC_PAGE - 0xc0000000) >> 21), 8, 0

    .balign 16
gdt:
    .quad 0
    .quad 0x00cf9b000000ffff        # CODE32
    .quad 0x00af9b000000ffff        # CODE64
    .quad 0x00cf93000000ffff        # DATA
    .quad 0x00cff3000000ffff        # USER_DATA
    .quad 0x00affb000000ffff        # USER_CODE
task_descriptors:
    .fill CPUS * 2, 8, 0
gdt_end:

    .globl gdt_pointer
gdt_pointer:
    .word gdt_end - gdt - 1
    .quad gdt
idt_pointer:
    .word 256 * 16 - 1
    .quad interrupt_table

task_reloads:
    .long 4096

    .section .bss
    .balign 4096
task_states:
    .skip CPUS << TASK_STATE_SHIFT
ring0_stacks:
    .skip CPUS << RING0_STACK_SHIFT
user_stacks:
    .skip CPUS << USER_STACK_SHIFT
    .skip 4096
panic_stack_end:
panicked:
    .long 0
    .globl device_events
device_events:
    .long 0
